"""A pass over a LeRobot dataset that was killed goes on with the files it had not read."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_lerobot as toy

from openvla_lightning.data.source.lerobot import building

SLOW = """
import sys, time
from pathlib import Path
import toy_lerobot as toy
from openvla_lightning.data.source.lerobot import building
building.KEPT_FROM = 0.0
read = building.read_rows
def slowly(job, path):
    if len(list(Path(sys.argv[1]).rglob("*.pass/*.npz"))) == 4:
        time.sleep(120)
    return read(job, path)
building.read_rows = slowly
toy.opened(Path(sys.argv[1]), "toy").prepare()
"""


def reads(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Names of the files that are read from now on: of parquet, and of videos."""
    rows, videos = [], []
    read_rows, read_packets = building.read_rows, building.read_packets
    monkeypatch.setattr(building, "read_rows", lambda job, path: (rows.append(job.path), read_rows(job, path))[1])
    monkeypatch.setattr(building, "read_packets", lambda *told: (videos.append(told[1]), read_packets(*told))[1])
    return rows, videos


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "toy"):
        toy.write(tmp_path / name / "toy", episodes_per_file=3)
    whole = toy.opened(tmp_path / "whole", "toy")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "toy")], env=environment)
    deadline = time.monotonic() + 100
    while len(list(tmp_path.rglob("*.pass/*.npz"))) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()

    rows, videos = reads(monkeypatch)
    resumed = toy.opened(tmp_path / "toy", "toy")
    resumed.prepare()
    assert (len(rows), len(videos)) == (2, 0)  # of three files each
    for name in ("action", "proprio", "bounds", "split", "instruction"):
        np.testing.assert_array_equal(getattr(resumed.index, name), getattr(whole.index, name))
    assert resumed.index.instructions == whole.index.instructions
    for step in range(0, resumed.index.num_steps, 5):
        for role in toy.CAMERAS:
            np.testing.assert_array_equal(resumed.pixels(role, step), whole.pixels(role, step))
    assert not list(tmp_path.rglob("*.pass"))


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "KEPT_FROM", 0.0)
    folder = toy.write(tmp_path / "toy")
    rows, videos = reads(monkeypatch)
    with monkeypatch.context() as failing:
        failing.setattr(building, "compare", lambda *told: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy.opened(tmp_path).prepare()
    assert (len(rows), len(videos)) == (3, 3)
    again = sorted(folder.rglob("*.mp4"))[1]
    os.utime(again, ns=(1, 1))
    rows.clear(), videos.clear()
    toy.opened(tmp_path).prepare()
    assert rows == []
    assert [folder / name for name in videos] == [again]
