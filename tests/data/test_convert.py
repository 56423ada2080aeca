"""From RLDS to LeRobot and back: every number stays, every picture is the same one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_lerobot as toy
import toy_rlds

from openvla_lightning.data.convert import lerobot, rlds, verification
from openvla_lightning.data.convert.__main__ import main
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.source.lerobot import LeRobot
from openvla_lightning.data.source.lerobot.encoding import Encoding
from openvla_lightning.data.source.lerobot.metadata import read_metadata
from openvla_lightning.data.source.lerobot.reading import EpisodeReader
from openvla_lightning.data.source.rlds import RLDS


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
