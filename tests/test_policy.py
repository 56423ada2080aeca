"""The policy: from an image and words to an action in the dataset's units."""

import copy
import json
import threading

import numpy as np
import pytest
import torch
from golden_sets import one
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_parts import TOWERS, tiny_vla

from openvla_lightning.action_head import TokenHead
from openvla_lightning.model import VLA
from openvla_lightning.policy import Policy, choose_device, choose_dtype, fingerprint
from openvla_lightning.processor import Processor
from openvla_lightning.statistics import DatasetStatistics, UnknownDatasetError
from openvla_lightning.types import Observation

TOKENS = {"vocab_size": 768, "num_bins": 256}
KEYS = ("bridge_orig", "fractal")


def statistics(scale: float) -> DatasetStatistics:
    low, high = -scale * np.arange(1, 8), scale * np.arange(2, 9)
    actions = np.linspace(low, high, 101)
    return DatasetStatistics.from_array(actions, mask=[True] * 6 + [False])


@pytest.fixture(scope="module")
def vla() -> VLA:
    model = tiny_vla()
    with torch.no_grad():  # untrained answers hardly move with the image; larger weights make them
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(TokenHead(**TOKENS), tokenizer="tiny", image_size=32, towers=TOWERS)


@pytest.fixture(scope="module")
def policy(vla: VLA, processor: Processor) -> Policy:
    return Policy(vla, processor, {"bridge_orig": statistics(0.01)}, device="cpu")


def images(count: int, size: tuple[int, int] = (32, 32)) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]


WORDS = ["lift the red cube", "push it", "put the green cube on the purple plate", "touch"]


def test_one_action_is_seven_doubles_within_the_datasets_range(policy):
    action = policy.act(images(1, (48, 64))[0], WORDS[0])
    assert action.shape == (7,)
    assert action.dtype == np.float64
    bounds = policy.statistics.action
    assert (action[:6] >= bounds["q01"][:6]).all()
    assert (action[:6] <= bounds["q99"][:6]).all()
    assert abs(action[6]) <= 1, "the gripper passes as it is"


def test_lists_give_what_each_gives_alone(policy):
    pictures = images(4, (40, 30))
    together = policy.act(pictures, WORDS)
    alone = np.stack([policy.act(picture, words) for picture, words in zip(pictures, WORDS, strict=True)])
    assert together.shape == (4, 7)
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(policy.act(np.stack(pictures), tuple(WORDS)), together)
    assert len(np.unique(together, axis=0)) > 1, "answers depend on what is asked"


def test_pil_and_arrays_are_the_same(policy):
    picture = images(1, (50, 70))[0]
    np.testing.assert_array_equal(policy.act(Image.fromarray(picture), "lift"), policy.act(picture, "lift"))


def test_the_image_matters(policy):
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert (policy.act(black, "lift") != policy.act(white, "lift")).any()


def test_an_action_is_the_decoded_ids_unnormalised(policy, vla, processor):
    picture = images(1)[0]
    ids = vla.generate(**processor([picture], ["lift"]), max_new_tokens=7)[0]
    centres = np.linspace(-1, 1, 256)
    centres = (centres[:-1] + centres[1:]) / 2
    normalised = centres[np.clip(768 - ids.numpy() - 1, 0, 254)]
    low, high = (policy.statistics.action[name] for name in ("q01", "q99"))
    expected = np.where([True] * 6 + [False], 0.5 * (normalised + 1) * (high - low) + low, normalised)
    np.testing.assert_allclose(policy.act(picture, "lift"), expected, rtol=0, atol=1e-15)


def test_each_dataset_has_its_own_scale(vla, processor):
    stats = {key: statistics(scale) for key, scale in zip(KEYS, (0.01, 1.0), strict=True)}
    small, large = (Policy(vla, processor, stats, key, device="cpu").act(images(1)[0], "lift") for key in KEYS)
    np.testing.assert_allclose(100 * small[:6], large[:6], rtol=1e-6)
    assert small[6] == large[6]


@pytest.mark.parametrize("method", ["quantile", "minmax", "meanstd"])
def test_the_method_of_training_comes_with_the_statistics(vla, processor, method):
    stats = {"d": {**statistics(0.5).to_dict(), "normalisation": method}}
    loaded, told = (
        Policy(vla, processor, stats, device="cpu"),
        Policy(vla, processor, {"d": statistics(0.5)}, normalisation=method, device="cpu"),
    )
    assert loaded.normalisation == loaded.provenance["normalisation"] == method
    np.testing.assert_array_equal(loaded.act(images(1)[0], "lift"), told.act(images(1)[0], "lift"))


def test_an_unknown_key_lists_the_known_ones(vla, processor):
    stats = dict.fromkeys(KEYS, statistics(1.0))
    with pytest.raises(KeyError, match=r"did you mean 'bridge_orig'.*bridge_orig, fractal"):
        Policy(vla, processor, stats, "bridge_orgi", device="cpu")
    with pytest.raises(KeyError, match="bridge_orig, fractal"):
        Policy(vla, processor, stats, device="cpu")
    with pytest.raises(KeyError):
        Policy(vla, processor, {}, device="cpu")


@pytest.mark.parametrize(
    ("image", "instruction", "error", "message"),
    [
        ([np.zeros((8, 8, 3), np.uint8)], "lift", TypeError, "lists of both"),
        (np.zeros((8, 8, 3), np.uint8), ["lift"], TypeError, "lists of both"),
        ([np.zeros((8, 8, 3), np.uint8)] * 2, ["lift"], ValueError, "2 images and 1 instructions"),
        ([], [], ValueError, "no images"),
        (np.zeros((8, 8, 3)), "lift", ValueError, "uint8"),
        (np.zeros((8, 8), np.uint8), "lift", ValueError, r"\[H, W, 3\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "lift", TypeError, "not Tensor"),
        (["image.png"], ["lift"], TypeError, "not str"),
    ],
)
def test_wrong_input_is_explained(policy, image, instruction, error, message):
    with pytest.raises(error, match=message):
        policy.act(image, instruction)


def test_a_single_observation_is_no_list(policy):
    for wrong in (Observation({"primary": images(1)[0]}, "lift"), [{"image": images(1)[0], "instruction": "lift"}]):
        with pytest.raises(TypeError, match=r"a list of Observations, one per robot: \[Observation\("):
            policy.act_chunk(wrong)


def test_dtypes_have_names():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    for wrong in ("int8", "nonsense", torch.int64):
        with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
            choose_dtype(wrong, torch.device("cpu"))


@pytest.mark.parametrize("device", ["gpu", "CPU", *["cuda:0"] * (not torch.cuda.is_available())])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(device):
    with pytest.raises(ValueError, match=f"device='{device}'.*use auto.*cpu"):
        choose_device(device)


def test_bfloat16_acts_on_the_cpu(vla, processor):
    policy = Policy(copy.deepcopy(vla), processor, {"d": statistics(1.0)}, device="cpu", dtype="bfloat16")
    assert next(policy.vla.parameters()).dtype == torch.bfloat16
    assert np.isfinite(policy.act(images(2), WORDS[:2])).all()


def test_a_fingerprint_is_the_files_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = fingerprint(tmp_path)
    (tmp_path / "b").write_bytes(b"")
    assert fingerprint(tmp_path) != before
    assert fingerprint("openvla/openvla-7b") is None


def test_saved_and_loaded_it_acts_the_same(vla, processor, tmp_path):
    vla.norm_stats = {"toy": statistics(0.01).to_dict()}
    vla.save_pretrained(tmp_path / "released", processor)
    loaded = Policy.from_pretrained(tmp_path / "released", device="cpu")
    pictures = images(4, (40, 50))
    before = Policy(vla, processor, vla.norm_stats, device="cpu").act(pictures, WORDS)
    np.testing.assert_array_equal(loaded.act(pictures, WORDS), before)
    assert loaded.provenance["sha256"] == fingerprint(tmp_path / "released")
    assert loaded.provenance["unnorm_key"] == "toy"
    cropped = Policy.from_pretrained(tmp_path / "released", device="cpu", center_crop=True)
    assert cropped.processor.config["crop_area"] == 0.9
    assert (cropped.act(pictures, WORDS) != before).any()


def test_an_unknown_key_is_refused_before_weights_are_read(vla, processor, tmp_path):
    vla.norm_stats = {"toy": statistics(0.01).to_dict()}
    vla.save_pretrained(tmp_path, processor)
    for weights in tmp_path.glob("*.safetensors"):  # the header stays, the values end the loading that reads them
        content = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}
        save_file(content, weights, metadata={"format": "pt"})
    with pytest.raises(UnknownDatasetError) as error:
        Policy.from_pretrained(tmp_path, "toys", device="cpu")
    assert str(error.value) == "no statistics for unnorm_key 'toys'; did you mean 'toy'? known: toy"


def test_actions_of_the_released_code(each_golden, monkeypatch):
    folder = one(each_golden / "model", "tiny_*")
    numbers = np.load(folder / "golden.npz")
    for key in json.loads((folder / "dataset_statistics.json").read_text()):
        policy = Policy.from_pretrained(folder, key, device="cpu", dtype="float32", tokenizer="tiny")
        cases = [i for i in range(len(numbers["input_ids"])) if f"predict_action/{key}/{i}" in numbers]
        assert cases
        ids = {str(i): [*numbers[f"gen/prompt_ids_{i}"].ravel().tolist(), 29871] for i in cases}
        monkeypatch.setattr(policy.processor, "prompt_ids", ids.__getitem__)
        actions = policy.act([numbers[f"image_{i}"] for i in cases], [str(i) for i in cases])
        expected = np.stack([numbers[f"predict_action/{key}/{i}"] for i in cases])
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-9)


def test_nothing_at_a_path_is_said_at_once():
    with pytest.raises(FileNotFoundError, match=r"no file or folder \./nowhere"):
        Policy.from_pretrained("./nowhere")


def test_threads_get_their_own_actions(policy):
    pictures = images(8, (40, 40))
    words = [f"lift cube {number} {'now ' * number}" for number in range(8)]
    expected = [policy.act(picture, text) for picture, text in zip(pictures, words, strict=True)]
    assert len(np.unique(expected, axis=0)) == 8
    wrong: list[int] = []
    start = threading.Barrier(8)

    def robot(number: int) -> None:
        start.wait()
        for _ in range(10):
            if not np.array_equal(policy.act(pictures[number], words[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=robot, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_warming_up_changes_no_action(vla, processor):
    cold, warm = (Policy(vla, processor, {"d": statistics(1.0)}, device="cpu", temperature=0.0) for _ in range(2))
    assert warm.warm_up(batch_sizes=(1, 2), instructions=("lift", "put it down")) > 0
    np.testing.assert_array_equal(warm.act(images(1)[0], "lift"), cold.act(images(1)[0], "lift"))


def test_requests_can_name_their_own_units(vla, processor):
    stats = {"small": statistics(0.01), "large": {**statistics(1.0).to_dict(), "normalisation": "minmax"}}
    policy = Policy(vla, processor, stats, "small", device="cpu")
    other = Policy(vla, processor, stats, "large", device="cpu")
    pictures, words = images(3), WORDS[:3]
    mixed = policy.act(pictures, words, [None, "large", "small"])
    np.testing.assert_array_equal(mixed[::2], policy.act(pictures, words)[::2])
    np.testing.assert_array_equal(mixed[1], other.act(pictures, words)[1])
    np.testing.assert_array_equal(policy.act(pictures[0], "lift", "large"), other.act(pictures[0], "lift"))
    with pytest.raises(KeyError, match="small, large"):
        policy.act(pictures[0], "lift", "medium")
    with pytest.raises(ValueError, match="3 images and 2 unnorm_keys"):
        policy.act(pictures, words, ["small", "large"])


def test_only_actions_can_be_asked_for(vla, processor):
    policy = Policy(vla, processor, {"d": statistics(1.0)}, device="cpu", action_ids_only=True)
    inputs = processor(images(4), WORDS)
    logits = vla(**inputs).logits[
        torch.arange(4), inputs["attention_mask"].sum(1) - 1 + vla.vision_backbone.num_patches
    ]
    best = policy.processor.action_head.decode(512 + logits[:, 512:].argmax(-1)).numpy()
    normalised = policy.statistics.normalise(policy.act(images(4), WORDS))
    np.testing.assert_allclose(normalised[:, 0], best, atol=1e-5)


def test_drawn_actions_follow_the_seed(vla, processor):
    options = {"temperature": 1.5, "top_k": 50, "action_ids_only": True}
    drawn = [
        Policy(vla, processor, {"d": statistics(1.0)}, device="cpu", seed=seed, **options).act(images(4), WORDS)
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_the_checkpoint_is_hashed_when_somebody_asks(vla, processor, tmp_path, monkeypatch):
    vla.norm_stats = {"toy": statistics(0.01).to_dict()}
    vla.save_pretrained(tmp_path / "released", processor)
    asked: list[str] = []
    monkeypatch.setattr("openvla_lightning.policy.fingerprint", lambda path: asked.append(str(path)) or "abc")
    policy = Policy.from_pretrained(tmp_path / "released", device="cpu")
    policy.act(images(1)[0], "lift")
    assert not asked
    assert policy.provenance["sha256"] == policy.provenance["sha256"] == "abc"
    assert asked == [str(tmp_path / "released")]
