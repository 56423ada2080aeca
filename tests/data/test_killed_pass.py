"""A pass over the files is never lost: killed, or ended by a damaged file, it goes on where it was."""

import os
import subprocess
import sys
import time
from pathlib import Path

import made_rlds
import numpy as np
import pytest

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds import building
from openvla_lightning.data.source.rlds.building import packed, unpacked
from openvla_lightning.data.source.rlds.indexing import Shard

SLOW = """
import os, sys, time
from pathlib import Path
import made_rlds
from openvla_lightning.data.source.rlds import building
building.KEPT_FROM = 0.0
read = building.read_shard
def slowly(job):
    if len(list(Path(sys.argv[1]).rglob("*.npz"))) == 3:
        time.sleep(60)
    return read(job)
building.read_shard = slowly
made_rlds.source(Path(sys.argv[1])).prepare()
"""


def dataset(root: Path, bad: int | None = None) -> Path:
    episodes = [made_rlds.episode(4 + i, i, words=[f"wort {i} ü"] * (3 + i) + [f"end {i}"]) for i in range(6)]
    if bad is not None:
        episodes[bad]["steps"][1]["observation"]["state"] = np.full(3, np.nan, np.float32)
    return made_rlds.write(root, episodes, episodes_per_shard=1)


def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read, names = building.read_shard, []
    monkeypatch.setattr(building, "read_shard", lambda job: (names.append(job.path.name), read(job))[1])
    monkeypatch.setattr(building, "KEPT_FROM", 0.0)
    return names


def same(one, two) -> None:
    for name in ("action", "proprio", "bounds", "split", "instruction", "trajectory"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_array_equal(one.images["primary"], two.images["primary"])
    assert one.instructions == two.instructions


def test_a_killed_pass_goes_on_with_the_files_it_had_not_read(tmp_path: Path, monkeypatch) -> None:
    dataset(tmp_path / "killed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "killed")], env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.npz"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    read = read_files(monkeypatch)
    source = made_rlds.source(tmp_path / "killed")
    source.prepare()
    assert [int(name[-14:-9]) for name in read] == [3, 4, 5]
    dataset(tmp_path / "whole")
    same(source.index, made_rlds.source(tmp_path / "whole").index)
    assert [path.name for path in source._home.parent.iterdir()] == [source._home.name]


@pytest.mark.parametrize("workers", [0, 2])
def test_after_a_damaged_file_was_replaced_only_that_one_is_read(tmp_path: Path, monkeypatch, workers: int) -> None:
    folder = dataset(tmp_path, bad=5)
    read = read_files(monkeypatch)
    with pytest.raises(BadShardError, match=r"00005-of-00006, trajectory 0: observation/state of step 1 is not finite"):
        made_rlds.source(tmp_path, state=["state"], workers=workers).prepare()
    dataset(tmp_path / "good")
    last = sorted(folder.glob("*.tfrecord*"))[-1]
    last.write_bytes((tmp_path / "good" / "made" / "1.0.0" / last.name).read_bytes())
    read.clear()
    source = made_rlds.source(tmp_path, state=["state"])
    source.prepare()
    assert read == [last.name]
    same(source.index, made_rlds.source(tmp_path / "good", state=["state"]).index)


def test_what_was_kept_of_other_settings_or_cut_short_is_read_again(tmp_path: Path, monkeypatch) -> None:
    dataset(tmp_path, bad=5)
    read = read_files(monkeypatch)
    with pytest.raises(BadShardError):
        made_rlds.source(tmp_path, state=["state"]).prepare()
    for kept in tmp_path.rglob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:-200])
    read.clear()
    source = made_rlds.source(tmp_path, state=["state"], bad_trajectories="skip")
    source.prepare()
    assert len(read) == 6
    read.clear()
    with pytest.raises(BadShardError):
        made_rlds.source(tmp_path, state=["state"]).prepare()
    assert len(read) == 6


def test_a_file_without_trajectories_is_kept_as_that() -> None:
    empty = Shard("train", images={"primary": []}, skipped=[{"file": "f", "trajectory": 0, "reason": "why"}])
    again = unpacked(packed(empty))
    assert (again.lengths, again.action, again.images, again.skipped) == ([], [], {"primary": []}, empty.skipped)
