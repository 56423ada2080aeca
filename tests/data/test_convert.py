"""From RLDS to LeRobot and back: every number stays, every picture is the same one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import toy_lerobot as toy
import toy_rlds

from openvla_lightning.data.convert import lerobot, rlds, verification
from openvla_lightning.data.convert.__main__ import main
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.source.lerobot import LeRobot
from openvla_lightning.data.source.lerobot.encoding import Encoding
from openvla_lightning.data.source.lerobot.metadata import Feature, read_metadata
from openvla_lightning.data.source.lerobot.reading import EpisodeReader
from openvla_lightning.data.source.lerobot.writer import Recording, write_lerobot
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.rlds.episodes import Episodes, leaf_of
from openvla_lightning.data.source.writer import write_rlds


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert")
    toy_rlds.write(root / "tabs" / "1.0.0")
    return root


@pytest.mark.parametrize("pictures", ["video", "png"])
def test_the_same_demonstrations_are_the_same_steps(both: Path, pictures: str) -> None:
    target = both / f"lerobot_{pictures}"
    found = rlds.to_lerobot(both / "tabs", target, fps=5, pictures=pictures, workers=0, encoding=Encoding(crf=4))
    assert found.episodes == toy_rlds.TRAIN + toy_rlds.VAL
    assert max(found.losses) < 4
    stored = RLDS(both, "tabs", describe("tabs", toy_rlds.SPEC))
    cameras = {"primary": "observation.images.image", "wrist": "observation.images.wrist", "secondary": None}
    options = {"format": "lerobot", "cameras": cameras, "state": ["observation.state", None], "noop_threshold": 1e-3}
    converted = LeRobot(both, target.name, describe("x", options | {"path": str(target)}))
    one, other = stored.index, converted.index
    for name in ("action", "proprio", "bounds", "split"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.splits == other.splits
    assert [one.instructions[i] for i in one.instruction] == [other.instructions[i] for i in other.instruction]
    assert stored.statistics == converted.statistics
    for step in range(one.num_steps):
        for role in ("primary", "wrist"):
            image, again = stored.image(role, step, 32), converted.image(role, step, 32)
            assert image is not None
            assert again is not None
            assert np.abs(image.astype(int) - again).mean() < (4 if pictures == "video" else 0.01)
    assert converted.image("secondary", 0, 32) is None


def test_and_back(both: Path) -> None:
    toy.write(both / "toy", splits={"train": (0, 5), "val": (5, 7)})
    found = lerobot.to_rlds(both / "toy", both / "back" / "1.0.0", workers=0, episodes_per_shard=2)
    assert found.steps == sum(toy.LENGTHS)
    spec = {"cameras": {"primary": "front", "wrist": "wrist"}, "state": ["state"]}
    stored, original = RLDS(both, "back", describe("back", spec)), toy.opened(both)
    for name in ("action", "proprio", "bounds", "split"):
        np.testing.assert_array_equal(getattr(stored.index, name), getattr(original.index, name))
    for step in range(stored.index.num_steps):
        image, own = stored.pixels("primary", step), original.pixels("primary", step)
        assert np.abs(image.astype(int) - own).mean() < 4
        np.testing.assert_array_equal(stored.pixels("wrist", step), original.pixels("wrist", step))  # PNG stays PNG
    again = rlds.to_lerobot(both / "back", both / "again", fps=10, workers=0, pictures="png")
    assert again.losses == [0.0] * len(again.losses)
    one, other = EpisodeReader(both / "toy"), EpisodeReader(both / "again")
    for place in range(len(toy.LENGTHS)):
        columns, same = one.columns(place), other.columns(place)
        for name in ("action", "observation.state", "next.done", "task"):
            np.testing.assert_array_equal(columns[name], same[name])


def test_the_command_shows_what_it_did_and_ends_with_one_line(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--fps", "5", "--workers", "0", "--codec", "av1", "--robot-type", "toy"]
    main(["rlds-to-lerobot", str(both / "tabs"), str(both / "av1"), *options])
    assert "every number bit-equal; " in capsys.readouterr().out
    assert read_metadata(both / "av1").info["robot_type"] == "toy"
    with pytest.raises(SystemExit, match="say --fps"):
        main(["rlds-to-lerobot", str(both / "tabs"), str(both / "other")])
    with pytest.raises(SystemExit, match="no actions: a step holds action, is_first"):
        main(["rlds-to-lerobot", str(both / "tabs"), str(both / "other"), "--fps", "5", "--action", "actions"])
    with pytest.raises(SystemExit, match="is no RLDS dataset"):
        main(["rlds-to-lerobot", str(both), str(both / "other"), "--fps", "5"])
    with pytest.raises(SystemExit, match="is no LeRobot dataset"):
        main(["lerobot-to-rlds", str(both / "tabs"), str(both / "other" / "1.0.0")])
    with pytest.raises(SystemExit, match="that was not written here"):
        main(["rlds-to-lerobot", str(both / "tabs"), str(_foreign(both)), "--fps", "5", "--workers", "0"])
    with pytest.raises(SystemExit, match="made with other fps"):
        main(
            ["rlds-to-lerobot", str(both / "tabs"), str(both / "av1"), "--fps", "6", "--codec", "av1", "--workers", "0"]
        )


def _foreign(root: Path) -> Path:
    folder = toy.write(root / "foreign")
    (folder / "meta" / "writing.json").unlink()
    return folder


def test_a_killed_conversion_goes_on_file_by_file(both: Path) -> None:
    target = both / "killed"
    command = [
        sys.executable,
        "-m",
        "openvla_lightning.data.convert",
        "rlds-to-lerobot",
        str(both / "tabs"),
        str(target),
    ]
    command += ["--fps", "5", "--workers", "0", "--episodes-per-file", "1"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while len(list(target.rglob("meta/episodes/**/*.parquet"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in target.rglob("meta/episodes/**/*.parquet")}
    assert len(done) < toy_rlds.TRAIN + toy_rlds.VAL
    assert not (target / "meta" / "info.json").exists()
    found = rlds.to_lerobot(both / "tabs", target, fps=5, workers=0, episodes_per_file=1)
    assert found.episodes == toy_rlds.TRAIN + toy_rlds.VAL
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())


def test_a_difference_is_found() -> None:
    columns = {"action": np.arange(6.0).reshape(3, 2), "task": np.array(["a", "b", "c"], object)}
    picture = np.zeros((4, 4, 3), np.uint8)

    def episode(**changed):
        return lambda number: (columns | changed, {"front": lambda step: changed.get("picture", picture)})

    assert verification.compare(2, episode(), episode()).steps == 6
    other = columns["action"].copy()
    other[2, 1] += 1e-6
    for changed, said in (
        ({"action": other}, r"episode 0: action of step 2 is array\(\[4. +, 5.000001"),
        ({"action": other[:2]}, r"action is \[2, 2\], it was \[3, 2\]"),
        ({"task": np.array(["a", "b", "d"], object)}, "task of step 2 is 'd', it was 'c'"),
        ({"more": other}, "more is on one side only"),
    ):
        with pytest.raises(verification.ConversionError, match=said):
            verification.compare(1, episode(), episode(**changed))
    with pytest.raises(verification.ConversionError, match="front of step 0 is another picture"):
        verification.compare(1, episode(), lambda number: (columns, {"front": lambda step: picture + np.uint8(99)}))


def step(**changed: Any) -> dict[str, Any]:
    """A step of an RLDS dataset with forms that real ones have: texts as tensors, images as numbers, a clock."""
    picture = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2) * 60, np.ones((16, 16), np.uint8))[..., None]
    whole = {
        "observation": {"grey": picture, "packed": picture.repeat(3, axis=2), "state": np.ones(3, np.float32)},
        "action": np.full(7, 0.5, np.float32),
        "language_instruction": ["", "grüß", "third"],
        "timestamp": np.float32(3.25),
        "marks": np.arange(2, dtype=np.float32),
    }
    return whole | changed


STORED = {
    "observation": tfds.features.FeaturesDict(
        {
            "grey": tfds.features.Tensor(shape=(32, 32, 1), dtype=np.uint8),
            "packed": tfds.features.Tensor(shape=(32, 32, 3), dtype=np.uint8, encoding="zlib"),
            "state": tfds.features.Tensor(shape=(3,), dtype=np.float32),
        }
    ),
    "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
    "language_instruction": tfds.features.Tensor(shape=(3,), dtype=np.str_),
    "timestamp": tfds.features.Scalar(dtype=np.float32),
    "marks": tfds.features.Tensor(shape=(2,), dtype=np.float32, encoding="zlib"),
}


def recorded(folder: Path, lengths: Sequence[int] = (0, 3, 2)) -> Path:
    tree = {"steps": tfds.features.Dataset(STORED)}
    tree |= {"episode_metadata": tfds.features.FeaturesDict({"file_path": tfds.features.Text()})}
    return write_rlds(
        folder,
        tfds.features.FeaturesDict(tree),
        {"train": len(lengths)},
        lambda split, i: {"steps": [step()] * lengths[i], "episode_metadata": {"file_path": "/x"}},
        workers=0,
        progress=False,
    )


@pytest.mark.parametrize("pictures", ["video", "png"])
def test_what_rlds_stores_in_another_form_becomes_lerobot_too(tmp_path: Path, pictures: str) -> None:
    said: list[str] = []
    recorded(tmp_path / "odd" / "1.0.0")
    found = rlds.to_lerobot(
        tmp_path / "odd",
        tmp_path / "new",
        fps=5,
        workers=0,
        pictures=pictures,
        encoding=Encoding(crf=4),
        say=said.append,
    )
    assert (found.episodes, found.steps, len(found.losses)) == (2, 5, 2 * (3 + 2))
    metadata = read_metadata(tmp_path / "new")
    assert metadata.tasks == {0: "grüß"}
    assert {name for name, feature in metadata.features.items() if feature.is_picture} == {
        "observation.images.grey",
        "observation.images.packed",
    }
    columns, cameras = EpisodeReader(tmp_path / "new")(1)
    assert columns["timestamp.recorded"].ravel().tolist() == [3.25] * 2
    assert (
        abs(cameras["observation.images.grey"](1)[:, :, 2].astype(int) - step()["observation"]["grey"][..., 0]).max()
        < 9
    )
    assert said == [
        "left out, as LeRobot has no place for it: marks",
        "left out, as it is said once per episode: episode_metadata",
        "left out, as they have no step: 1 episodes",
    ]


def test_what_is_named_must_be_an_action_and_a_text(tmp_path: Path) -> None:
    command = ["rlds-to-lerobot", str(recorded(tmp_path / "odd" / "1.0.0")), str(tmp_path / "new"), "--fps", "5"]
    for options, said in (
        (["--language", "action"], "action is float32, not the text of an instruction"),
        (["--action", "observation/grey"], "observation/grey is pixels, not the numbers of an action"),
        (["--episodes-per-file", "0"], "episodes_per_file=0 at least 1"),
        (["--fps", "0"], "fps=0 must be above 0"),
        (["--crf", "52"], r"crf=52 lie in 0\.\.51"),
        (["--key-every", "0"], "key_every=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit, match=said):
            main([*command, "--workers", "0", *options])
    recorded(tmp_path / "empty" / "1.0.0", [0, 0])
    with pytest.raises(SystemExit, match="no episode has a step"):
        main(["rlds-to-lerobot", str(tmp_path / "empty"), str(tmp_path / "new"), "--fps", "5"])
    assert not (tmp_path / "new").exists()


def test_columns_whose_names_an_rlds_dataset_has_itself_are_kept_beside_it(tmp_path: Path) -> None:
    more = {"is_last": ("bool", False), "language_instruction": ("string", "again"), "action.grip": ("float32", 0.5)}
    more |= {"observation.wrist": ("float32", 0.25)}  # also a camera's path

    def record(number: int) -> Recording:
        known = toy.recording(number)
        own = {name: np.array([[value]] * toy.LENGTHS[number]) for name, (_, value) in more.items()}
        return Recording({**known.columns, **own}, known.pictures, known.tasks)

    features = toy.FEATURES | {name: Feature(dtype, (1,)) for name, (dtype, _) in more.items()}
    options: dict[str, Any] = {"fps": 10, "workers": 0, "progress": False}
    write_lerobot(tmp_path / "droid", features, toy.LENGTHS, toy.TASKS, record, **options)
    lerobot.to_rlds(tmp_path / "droid", tmp_path / "new" / "1.0.0", workers=0)
    steps = Episodes(tmp_path / "new" / "1.0.0", "language_instruction")(1)
    assert leaf_of(steps, "is_last").tolist() == [False] * 8 + [True]
    assert leaf_of(steps, "is_last.recorded").tolist() == [False] * 9
    assert set(leaf_of(steps, "language_instruction.recorded").tolist()) == {b"again"}
    assert leaf_of(steps, "action").shape == (9, 7)
    assert leaf_of(steps, "action.grip").tolist() == [0.5] * 9
    assert leaf_of(steps, "observation.wrist").tolist() == [0.25] * 9
