"""No sample fails when it is drawn: what cannot be served is found before training, and what fails says where."""

import json
import logging
import re
from functools import partial
from pathlib import Path

import lightning as L
import made_rlds
import numpy as np
import pytest
import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openvla_lightning.action_head import TokenHead
from openvla_lightning.actions import ActionTokenizer
from openvla_lightning.data import ConversationDataModule, VLADataModule
from openvla_lightning.data.filters import select, split_trajectories, unused_splits
from openvla_lightning.data.loader import SampleError
from openvla_lightning.data.oxe import DatasetSpec
from openvla_lightning.data.round_trip import round_trip
from openvla_lightning.data.source.conversations import Conversations
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.processor import Processor
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Observation, Step


def processor(**options) -> Processor:
    return Processor(TokenHead(vocab_size=768), image_size=16, means=[[0.5] * 3], stds=[[0.5] * 3], **options)


def opened(root: Path, spec: dict | None = None, reads: Processor | None = None, **options) -> VLADataModule:
    defaults = {"mix": {"made": 1.0}, "image_size": 16, "global_batch_size": 4, "num_workers": 0, "val_fraction": 0.0}
    defaults |= {"datasets": {"made": made_rlds.SPEC | (spec or {})}, "collate": (reads or processor()).collate}
    return serving.opened(VLADataModule(partial(RLDS, root), **defaults | options))


def drawn(data: VLADataModule) -> list[str]:
    """Words of everything that is served in an epoch."""
    numbers = [number for batch in data.train_dataloader() for number in batch.numbers]
    served = data.train["made"]
    return [served.instruction(int(data.order(np.array([n]))[1][0])) for n in numbers]


def test_steps_without_words_among_others_are_left_out_and_counted(tmp_path: Path, caplog) -> None:
    words = ["open it", "open it", "", "close it", " ", "close it"]
    made_rlds.write(tmp_path, [made_rlds.episode(6, i, words=words) for i in range(4)])
    data = opened(tmp_path)
    assert (data.filter_report["made"].wordless, data.filter_report["made"].kept) == (8, 16)
    assert "made: 8 steps are left out because nothing is said at them" in caplog.text
    assert set(drawn(data)) == {"open it", "close it"}


@pytest.mark.parametrize("statistics", ["released", "train"])
def test_what_left_no_step_to_train_on_is_said(tmp_path: Path, statistics: str) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(6, i, words=[""] * 6) for i in range(3)])
    with pytest.raises(ValueError, match=r"no step is left after filters and split, of 18 in 3 .*nothing said"):
        opened(tmp_path, statistics=statistics)


def test_chunks_that_mostly_teach_standing_still_are_said(tmp_path: Path, caplog) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(6, i) for i in range(4)])
    opened(tmp_path, action_chunk=4)
    assert "made: 25% of the actions in chunks of 4 lie past the end" in caplog.text
    caplog.clear()
    opened(tmp_path, action_chunk=4, chunk_end="mask")
    assert "past the end" not in caplog.text


BAD = {"x" * 5000: "tokens of 2048", "lift\x00it": "control characters", "\u200b": "is empty"}


@pytest.mark.parametrize("bad", BAD)
def test_what_the_model_cannot_be_given_is_left_out_and_counted_or_refused(tmp_path: Path, bad: str, caplog) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(6, i, words=bad if i == 2 else "lift it") for i in range(4)])
    data = opened(tmp_path)
    assert (data.filter_report["made"].refused, data.filter_report["made"].kept) == (6, 18)
    assert "1 of 2 instructions cannot be given to the model, and their steps are left out" in caplog.text
    assert BAD[bad] in caplog.text
    assert set(drawn(data)) == {"lift it"}
    with pytest.raises(ValueError, match=r"1 of 2 instructions.*data\.bad_instructions=skip leaves their steps out"):
        opened(tmp_path, bad_instructions="error")


@settings(max_examples=60)
@given(st.text(max_size=300), st.integers(40, 120))
def test_what_is_not_refused_can_be_collated_and_what_is_too_long_cannot(words: str, max_length: int) -> None:
    reads = processor(max_length=max_length)
    seen = Observation({"primary": np.zeros((16, 16, 3), np.uint8)}, words)
    step = Step(observation=seen, action=np.zeros((1, 7), np.float32), dataset_name="d", number=0)
    if reads.refuses(words, 7) is None:
        assert reads.collate([step]).input_ids.shape[1] <= max_length
    elif "tokens" in reads.refuses(words, 7):
        with pytest.raises(ValueError, match="tokens"):
            reads.collate([step])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_all_the_same_says_which_step_of_which_file(tmp_path: Path, workers: int) -> None:
    broken = b"\xff\xd8 whole at both ends only \xff\xd9"
    image = lambda t: broken if t == 4 else made_rlds.picture(t)  # noqa: E731
    made_rlds.write(tmp_path, [made_rlds.episode(6, i, image=image if i == 1 else None) for i in range(3)])
    data = opened(tmp_path, num_workers=workers, global_batch_size=18)
    where = r"^made, trajectory 1, step 4 of made-train\S+, primary image: .*cannot be decoded"
    with pytest.raises(SampleError, match=where):
        next(iter(data.train_dataloader()))


def test_a_step_that_cannot_be_collated_is_named_too(tmp_path: Path) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(3, i, words=f"task {i}") for i in range(3)])

    def collate(steps: list) -> list:
        if any(step.observation.instruction == "task 1" for step in steps):
            raise ValueError("no room")
        return steps

    data = opened(tmp_path, collate=collate, global_batch_size=9)
    with pytest.raises(SampleError, match=r"made, trajectory 1, step \d of made-train\S+: no room"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_validation_split_is_held_out_and_others_are_named(tmp_path: Path, name: str, caplog) -> None:
    caplog.set_level(logging.INFO)
    episodes = {"train": 4, name: 2, "test": 1}
    made_rlds.write(tmp_path, {s: [made_rlds.episode(5, i, words=s) for i in range(n)] for s, n in episodes.items()})
    data = opened(tmp_path, val_fraction=0.5)
    index = data.sources["made"].index
    assert split_trajectories(index, "val", 0.5, "made").sum() == 2
    assert len(data.train["made"]) == 20
    assert {data.val["made"].instruction(i) for i in range(10)} == {name}
    assert unused_splits(index) == {"test": 5}
    assert "made: splits that are neither trained on nor held out: test (5 steps)" in caplog.text


def chat(root: Path, missing: list[int], count: int = 12, **options) -> Conversations:
    (root / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(made_rlds.picture(3)).save(root / "images" / "a.jpg")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]
    entries = [
        {"id": i, "image": f"gone/{i}.jpg" if i in missing else "images/a.jpg", "conversations": turns}
        for i in range(count)
    ]
    (root / "mix.json").write_text(json.dumps([*entries, {"id": "text", "conversations": turns}]))
    return Conversations("mix", root / "mix.json", root, **options)


def test_every_image_of_conversations_is_looked_for(tmp_path: Path, caplog) -> None:
    match = r"mix\.json: 2 of 13 conversations name an image that is not in .*first gone/5\.jpg \(entry 5\), gone/7"
    with pytest.raises(FileNotFoundError, match=match):
        chat(tmp_path, [5, 7]).prepare()
    source = chat(tmp_path, [5, 7], missing_images="skip")
    assert len(source) == 11
    assert [source.read(i, i).number for i in range(11)] == list(range(11))
    assert "2 of 13 conversations name an image" in caplog.text
    assert len(chat(tmp_path, [])) == 13
    with pytest.raises(ValueError, match="missing_images=ignore: choose error or skip"):
        chat(tmp_path, [], missing_images="ignore")


def test_a_conversation_that_cannot_be_read_says_which(tmp_path: Path) -> None:
    source = chat(tmp_path, [], count=3)
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    data = ConversationDataModule(lambda name: source, list, 16, 4, "mix", val_fraction=0, num_workers=0)
    data.prepare_data()
    data.setup()
    with pytest.raises(SampleError, match=r"mix, entry \d: .*a\.jpg is no image that can be read"):
        list(data.train_dataloader())


def acted(gripper: np.ndarray, **changes) -> list[dict]:
    episodes = []
    for seed in range(4):
        action = np.random.default_rng(seed).normal(size=(len(gripper), 7)).astype(np.float32)
        action[:, 6] = gripper
        for dim, column in changes.items():
            action[:, int(dim[1:])] = column
        episodes.append(made_rlds.episode(len(gripper), seed, action=action))
    return episodes


CLOSING = np.array([0, 0, 0, 1, 1, 1], np.float32)


@pytest.mark.parametrize("scale", [850, 100, 65, 1.5])
def test_a_gripper_in_its_own_units_is_refused_with_the_two_ways_out(tmp_path: Path, scale: float) -> None:
    made_rlds.write(tmp_path, acted(CLOSING * scale))
    data = opened(tmp_path)
    message = rf"made: gripper lies in 0\.\.{scale:g}\. It is not normalised.*`transform`.*`mask: \[true, \.\.\.\]`"
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()
    again = opened(tmp_path)
    again.filter_report = {}
    again.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(ValueError, match=message):
        again.setup("fit")
    assert next(iter(opened(tmp_path, {"mask": [True] * 7}).train_dataloader()))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gripper": CLOSING * 0 + 1}, "gripper is always 1 and comes back as 0"),
        ({"gripper": CLOSING * 0.08}, r"gripper is not normalised and spans only 10 of 255 bins \(0\.\.0\.08\)"),
        ({"gripper": CLOSING * 0.5 + 0.1}, "gripper, the last of 7, is taken for a gripper but is not binary"),
    ],
)
def test_what_a_policy_cannot_give_back_is_said_at_setup(tmp_path: Path, caplog, changed: dict, said: str) -> None:
    made_rlds.write(tmp_path, acted(changed["gripper"]))
    opened(tmp_path)
    (line,) = [r.getMessage() for r in caplog.records if "cannot give back" in r.getMessage()]
    assert line.startswith("made: ")
    assert re.search(said, line)


def test_a_dimension_that_seldom_speaks_is_said_to_be_lost(tmp_path: Path, caplog) -> None:
    episodes = acted(np.resize(CLOSING, 150))
    for number, episode in enumerate(episodes):
        for t, step in enumerate(episode["steps"]):
            step["action"][2] = float(number == 1 and t == 4)
    made_rlds.write(tmp_path, episodes)
    opened(tmp_path)
    assert "z is 0 in nearly all steps" in caplog.text
    assert "its other values (0..1) are lost" in caplog.text


def test_six_dimensions_without_a_gripper_are_remarked(tmp_path: Path, caplog) -> None:
    action = (np.random.default_rng(0).normal(size=(40, 6)) * 0.02).astype(np.float32)
    made = made_rlds.features(action=made_rlds.F.Tensor(shape=(6,), dtype=np.float32))
    made_rlds.write(tmp_path, [made_rlds.episode(40, i, action=action) for i in range(2)], made)
    opened(tmp_path)
    assert "5, the last of 6, is taken for a gripper but is not binary (say `mask` and `absolute`)" in caplog.text


VALUES = st.one_of(
    st.floats(-1000, 1000, width=32), st.sampled_from([0.0, 1.0, -1.0, 0.08, 850.0]), st.floats(-1, 1, width=32)
)


@settings(max_examples=200)
@given(
    st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=40),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.sampled_from(["quantile", "minmax", "meanstd"]),
    st.integers(1, 50),
)
def test_every_demonstrated_value_comes_back_within_a_bin_or_its_dimension_is_named(
    rows: list[list[float]], mask: list[bool], normalisation: str, repeated: int
) -> None:
    action = np.array([*rows, *[rows[0]] * repeated], np.float32)
    statistics = DatasetStatistics.from_array(action, mask=mask)
    spec = DatasetSpec("d", lambda trajectory: trajectory, {}, mask=tuple(mask))
    trip = round_trip(action, statistics, normalisation, spec)
    said = [*trip.outside, *trip.remarks, *(f"{name} " for name in trip.clipped)]
    tokens = ActionTokenizer()

    def ends(d: int) -> list[float]:
        return [statistics.unnormalise(np.full(3, end), normalisation)[d] for end in (-1.0, 1.0)]

    for d in range(3):
        if any(sentence.startswith((f"{d} ", f"{d}'")) for sentence in said):
            continue
        low, high = ends(d)
        for value in (action[:, d].min(), np.median(action[:, d]), action[:, d].max()):
            row = np.full(3, value)
            ids = tokens.encode(statistics.normalise(row, normalisation))
            back = statistics.unnormalise(tokens.decode(ids), normalisation)[d]
            assert abs(back - value) <= (high - low) / 255 * (1 + 1e-5) + 1e-6 * max(1, abs(value)), said


def test_selections_of_other_refusals_are_kept_apart(tmp_path: Path) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(6, i, words=f"task {i}") for i in range(3)])
    source = made_rlds.source(tmp_path)
    options = {"val_fraction": 0.0, "noop_filter": "none"}
    assert len(select(source, "train", **options)[0]) == 18
    assert len(select(source, "train", refused=[1], **options)[0]) == 12
    assert len(select(source, "train", **options)[0]) == 18
