"""Images, words and states in the forms that people store them in; where one is no use, a sentence says why."""

import io
from pathlib import Path

import made_rlds
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openvla_lightning.data.images import decode
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds.arrays import Layout
from openvla_lightning.data.source.words import instructions_of, numbered

F = made_rlds.F


def raw(*shape: int, encoding: str = "none", dtype: type = np.uint8) -> F.Tensor:
    return F.Tensor(shape=shape, dtype=dtype, encoding=encoding)


@pytest.mark.parametrize("encoding", ["none", "zlib", "bytes"])
@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_images_stored_as_numbers_are_read_bit_for_bit(tmp_path: Path, encoding: str, channels: tuple) -> None:
    rng = np.random.default_rng(len(channels))
    shown = rng.integers(0, 256, (2, 5, 16, 24, *channels), dtype=np.uint8)
    episodes = [made_rlds.episode(5, i, image=lambda t, i=i: shown[i, t]) for i in range(2)]
    made_rlds.write(tmp_path, episodes, made_rlds.features(image=raw(16, 24, *channels, encoding=encoding)))
    source = made_rlds.source(tmp_path)
    source.check()
    for step in range(10):
        meant = shown[step // 5, step % 5].reshape(16, 24, -1)[..., :3]
        np.testing.assert_array_equal(decode(source.encoded("primary", step)), np.broadcast_to(meant, (16, 24, 3)))
    assert source.image("primary", 3, 8).shape == (8, 8, 3)


@given(st.lists(st.integers(0, 255), min_size=12, max_size=12))
def test_numbers_survive_protocol_buffers(numbers: list[int]) -> None:
    content = b"".join(bytes([n]) if n < 128 else bytes([n & 0x7F | 0x80, 1]) for n in numbers)
    assert Layout((2, 2, 3), "varint").pixels(content).ravel().tolist() == numbers


@pytest.mark.parametrize(
    ("feature", "image", "message"),
    [
        (raw(8, 8, 3, dtype=np.float32), np.zeros((8, 8, 3), np.float32), r"observation/image is float32 \[8, 8, 3\]"),
        (raw(3, 8, 8), np.zeros((3, 8, 8), np.uint8), r"observation/image is uint8 \[3, 8, 8\]: an image is stored as"),
        (raw(7), np.zeros(7, np.uint8), r"observation/image is uint8 \[7\]"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(tmp_path: Path, feature, image, message: str) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(image=lambda t: image)], made_rlds.features(image=feature))
    with pytest.raises(BadShardError, match=rf"made: {message}.*docs/data\.md"):
        made_rlds.source(tmp_path).prepare()


def jpeg(form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(made_rlds.picture(0)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("behind", [b"", bytes(8), bytes(15), bytes(513), b"serial 4711 " * 20])
def test_bytes_behind_an_images_end_are_no_damage(tmp_path: Path, form: str, behind: bytes) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(image=lambda t: jpeg(form) + behind)])
    assert made_rlds.source(tmp_path).index.num_steps == 6
    with_end_lost = made_rlds.episode(image=lambda t: jpeg(form)[:-40] + behind)
    made_rlds.write(tmp_path, [with_end_lost], name="cut")
    with pytest.raises(BadShardError, match="image of step 0 is an image cut short"):
        made_rlds.source(tmp_path, "cut").prepare()


def texts(*entries: str) -> np.ndarray:
    return np.array([entry.encode() for entry in entries], object)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (texts("go to the door", "walk to the exit", "", ""), "go to the door"),
        (texts("", " ", "walk to the exit", ""), "walk to the exit"),
        (texts("go", "", "", ""), "go"),
    ],
)
def test_of_several_instructions_a_step_the_first_that_says_something_counts(tmp_path: Path, words, said: str) -> None:
    made = made_rlds.features(language=F.Tensor(shape=(4,), dtype=np.object_))
    made_rlds.write(tmp_path, [made_rlds.episode(words=words)], made)
    assert made_rlds.words(made_rlds.source(tmp_path)) == [said] * 6


@pytest.mark.parametrize(
    "language",
    [
        "language_instruction",
        "episode_metadata/language_instruction",
        "traj_metadata/episode_metadata/language_instruction",
    ],
)
def test_what_is_said_once_per_episode_is_heard_at_every_step(tmp_path: Path, language: str) -> None:
    made = made_rlds.features(
        language=False, metadata={"language_instruction": F.Text(), "success": F.Scalar(np.bool_)}
    )
    facts = [{"language_instruction": f"open drawer {i}", "success": i > 0} for i in range(2)]
    made_rlds.write(tmp_path, [made_rlds.episode(3, i, words=False, metadata=facts[i]) for i in range(2)], made)
    assert (
        made_rlds.words(made_rlds.source(tmp_path, language=language)) == ["open drawer 0"] * 3 + ["open drawer 1"] * 3
    )


def successful(trajectory: dict) -> dict:
    success = trajectory["traj_metadata"]["episode_metadata"]["success"]
    assert success.shape == (len(trajectory["action"]),)
    return trajectory | {"language_instruction": ["pose le gâteau" if s else "échoue" for s in success]}


def test_a_transform_is_given_the_episodes_metadata_and_may_return_text(tmp_path: Path) -> None:
    made = made_rlds.features(metadata={"success": F.Scalar(np.bool_)})
    made_rlds.write(tmp_path, [made_rlds.episode(2, i, metadata={"success": i > 0}) for i in range(2)], made)
    source = made_rlds.source(tmp_path, transform=f"{__name__}.successful")
    assert made_rlds.words(source) == ["échoue"] * 2 + ["pose le gâteau"] * 2


@pytest.mark.parametrize(
    ("words", "heard"),
    [
        (["a", "", "", "", "", ""], ["a"] * 6),
        (["", "", "", "", "", "a"], ["a"] * 6),
        (["a", "a", "", "b", "b", " "], ["a", "a", "", "b", "b", ""]),
        ([""] * 6, [""] * 6),
    ],
)
def test_one_text_holds_for_its_episode_and_of_several_none_is_guessed(tmp_path: Path, words, heard) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(words=words)])
    assert made_rlds.words(made_rlds.source(tmp_path)) == heard


@pytest.mark.parametrize(
    ("leaf", "heard"),
    [
        ("pousse", ["pousse"] * 3),
        (b"push", ["push"] * 3),
        (["é", "b", "c"], ["é", "b", "c"]),
        (np.array(["é", "b", "c"]), ["é", "b", "c"]),
        (np.array([b"x", b"yyyy", b"z"]), ["x", "yyyy", "z"]),
        (np.array([[b"", b"x"], [b"y", b""], [b"z", b"w"]], object), ["x", "y", "z"]),
    ],
)
def test_text_comes_as_strings_bytes_lists_or_arrays(leaf, heard: list[str]) -> None:
    found = instructions_of({"language_instruction": leaf}, "language_instruction", 3)
    assert [text.decode() for text in found] == heard


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (np.zeros(3, np.int64), "is not text but int"),
        (["a"], "3 actions and 1 entries of words"),
        ([None] * 3, "not text"),
    ],
)
def test_what_is_no_text_is_said_to_be_none(leaf, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        instructions_of({"words": leaf}, "words", 3)


@given(st.lists(st.lists(st.sampled_from([b"a", b"bb", "é".encode(), b""]), max_size=5), max_size=5))
def test_texts_are_numbered_as_sorted(parts: list[list[bytes]]) -> None:
    numbers, words = numbered(np.array([*part, None], object)[:-1] for part in parts)
    every = [text for part in parts for text in part]
    assert words == sorted(set(every))
    assert [words[n] for n in numbers] == every


def test_a_long_text_costs_its_length_once() -> None:
    import tracemalloc

    long = b"w" * 100_000
    parts = [np.array([long if k == 0 else b"put the spoon on the towel"] * 100, object) for k in range(200)]
    tracemalloc.start()
    numbers, words = numbered(parts)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert len(numbers) == 20_000
    assert len(words) == 2


@pytest.mark.parametrize("how", ["error", "skip"])
def test_a_state_that_is_not_finite_names_its_trajectory_or_is_left_out(tmp_path: Path, how: str) -> None:
    state = np.zeros((6, 3), np.float32)
    state[3, 2] = np.nan
    made_rlds.write(tmp_path, [made_rlds.episode(6, i, state=state if i == 2 else None) for i in range(4)])
    source = made_rlds.source(tmp_path, state=["state"], bad_trajectories=how)
    if how == "skip":
        assert source.index.num_trajectories == 3
        assert source.index.skipped[0]["trajectory"] == 2
        return
    with pytest.raises(BadShardError, match=r"made: .*trajectory 2: observation/state of step 3 is not finite"):
        source.prepare()


def raising(trajectory: dict) -> dict:
    raise ZeroDivisionError("the gripper has no width")


def shorter(trajectory: dict) -> dict:
    return trajectory | {"action": trajectory["action"][1:]}


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        ("raising", "its transform raising raised ZeroDivisionError: the gripper"),
        ("shorter", "there are 5 actions and 6 entries of"),
    ],
)
def test_what_a_transform_does_wrong_is_about_its_trajectory(tmp_path: Path, transform: str, reason: str) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode()])
    with pytest.raises(BadShardError, match=f"trajectory 0: {reason}"):
        made_rlds.source(tmp_path, transform=f"{__name__}.{transform}").prepare()


def wider(trajectory: dict) -> dict:
    """Trajectories of four steps get one number more in the action, those of five in the state."""
    action, seen = trajectory["action"], trajectory["observation"]
    if (steps := len(action)) == 4:
        return trajectory | {"action": np.zeros((4, 8), np.float32)}
    return trajectory | {"observation": seen | {"state": np.zeros((steps, 4 if steps == 5 else 3), np.float32)}}


@pytest.mark.parametrize("per_shard", [1, 9])
@pytest.mark.parametrize("length", [4, 5])
def test_a_trajectory_of_another_width_is_named_or_left_out(tmp_path: Path, length: int, per_shard: int) -> None:
    made = [made_rlds.episode(steps) for steps in (6, 0, 7, length, 8)]
    made_rlds.write(tmp_path, made, episodes_per_shard=per_shard)
    options = {"transform": f"{__name__}.wider", "state": ["state"]}
    number = 0 if per_shard == 1 else 3
    with pytest.raises(BadShardError, match=rf"made: .*, trajectory {number}: its action has .* numbers, those of"):
        made_rlds.source(tmp_path, **options).prepare()
    left = made_rlds.source(tmp_path, bad_trajectories="skip", **options)
    assert np.diff(left.index.bounds).tolist() == [6, 0, 7, 8]
    assert [one["trajectory"] for one in left.index.skipped] == [number]
    assert left.index.images["primary"].shape == (21, 3)


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.int64), r"int64 \[8, 8, 3\]"),
        (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \[8, 8, 4\]"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\]"),
        ("a.png", "str"),
    ],
)
def test_the_writer_says_which_image_of_which_episode_is_none(tmp_path: Path, image, what: str) -> None:
    episodes = [made_rlds.episode(), made_rlds.episode(image=lambda t: image if t == 3 else made_rlds.picture(t))]
    with pytest.raises(
        ValueError, match=rf"episode 1 of train: steps/3/observation/image is {what}.*uint8.* \[H, W, 3\]"
    ):
        made_rlds.write(tmp_path, episodes)
