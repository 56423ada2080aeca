"""Datasets come out whole, or not at all, and tfds reads them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import toy_rlds
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.data.images import decode
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds import records
from openvla_lightning.data.source.writer import write_rlds

RUN = """
import sys, toy_rlds
from openvla_lightning.data.source.writer import write_rlds
if __name__ == "__main__":
    folder, episode, each = sys.argv[1], getattr(toy_rlds, sys.argv[2]), int(sys.argv[3])
    write_rlds(folder, toy_rlds.FEATURES, {"train": 4 * each}, episode, episodes_per_shard=each, workers=2)
"""


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("toy-*.tfrecord-*"))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards(folder)}


def start(tmp_path: Path, mark: Path, folder: Path, episode: str, each: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environment = os.environ | {"TOY_MARK": str(mark), "PYTHONPATH": path}
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(folder), episode, str(each)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def test_tfds_reads_back_what_was_written(toy_root: Path) -> None:
    info = tfds.builder_from_directory(str(toy_root / "toy" / "1.0.0")).info
    assert (info.name, str(info.version), info.file_format.value) == ("toy", "1.0.0", "tfrecord")
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 12, "val": 3}
    assert info.splits["train"].shard_lengths == [5, 5, 2]
    index = 0
    for path in info.splits["train"].filepaths:
        for _, record in records.read(Path(path)):
            read = info.features.deserialize_example_np(record, decoders={"steps": tfds.decode.SkipDecoding()})
            meant = toy_rlds.episode("train", index)
            actions = np.stack([step["action"] for step in meant["steps"]])
            np.testing.assert_array_equal(read["steps"]["action"], actions)
            assert read["steps"]["language_instruction"][0].decode() == meant["steps"][0]["language_instruction"]
            pixels = decode(read["steps"]["observation"]["image"][-1])
            assert np.abs(pixels.astype(int) - meant["steps"][-1]["observation"]["image"]).max() <= 2
            assert read["episode_metadata"]["number"] == index
            index += 1
    assert index == 12
    assert "tensorflow" not in sys.modules


def test_processes_write_the_same_bytes_as_one(toy_root: Path, tmp_path: Path) -> None:
    toy_rlds.write(tmp_path / "toy" / "1.0.0", workers=2)
    assert contents(tmp_path / "toy" / "1.0.0") == contents(toy_root / "toy" / "1.0.0")


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder, mark = tmp_path / "toy" / "1.0.0", tmp_path / "mark"
    with start(tmp_path, mark, folder, "slow_episode", 2) as run:
        deadline = time.monotonic() + 60
        while not mark.exists() or len(shards(folder)) < 3:
            assert run.poll() is None, "the writer stopped by itself"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    finished = {p: p.stat().st_mtime_ns for p in shards(folder)}
    assert len(finished) == 3
    assert not (folder / "dataset_info.json").exists()

    arguments = (toy_rlds.FEATURES, {"train": 8}, toy_rlds.slow_episode)
    write_rlds(folder, *arguments, episodes_per_shard=2, workers=0, progress=False)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert not list(folder.glob(".*.partial"))
    whole = toy_rlds.write(tmp_path / "other" / "toy" / "1.0.0", {"train": 8}, episodes_per_shard=2)
    assert contents(folder) == contents(whole)


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    """Two trainings that begin together want the same demonstrations; the second must not write over the first's."""
    folder, mark = tmp_path / "toy" / "1.0.0", tmp_path / "mark"
    runs = [start(tmp_path, mark, folder, "counted", 10) for _ in range(2)]
    for run in runs:
        _, said = run.communicate(timeout=120)
        assert run.returncode == 0, said.decode()
    assert sorted(map(int, mark.read_text().split())) == list(range(40))
    assert not list(folder.glob(".*"))


def test_finished_datasets_are_left_alone_and_others_not_overwritten(tmp_path: Path) -> None:
    folder = toy_rlds.write(tmp_path / "toy" / "1.0.0", {"train": 2}, recipe={"seed": 1})
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    toy_rlds.write(folder, {"train": 2}, recipe={"seed": 1})
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert json.loads((folder / "generation.json").read_text())["recipe"] == {"seed": 1}
    with pytest.raises(ValueError, match=r"made with other recipe.*Delete the folder"):
        toy_rlds.write(folder, {"train": 2}, recipe={"seed": 2})
    with pytest.raises(ValueError, match="other splits"):
        toy_rlds.write(folder, {"train": 3}, recipe={"seed": 1})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tfrecord-00000-of-00001").touch()
    with pytest.raises(ValueError, match="not written by write_rlds"):
        toy_rlds.write(tmp_path / "foreign")
    with pytest.raises(ValueError, match="at least one episode"):
        toy_rlds.write(tmp_path / "empty", {"train": 0})
    with pytest.raises(ValueError, match="at least one episode; got episodes_per_shard=0"):
        toy_rlds.write(tmp_path / "empty", episodes_per_shard=0)


def test_an_episode_that_cannot_be_made_or_written_is_named(tmp_path: Path) -> None:
    def unreadable(split: str, index: int) -> dict:
        raise ValueError("no image")

    def without_an_action(split: str, index: int) -> dict:
        made = toy_rlds.episode(split, index)
        return made | {
            "steps": [{key: value for key, value in step.items() if key != "action"} for step in made["steps"]]
        }

    for episode, said in ((unreadable, "no image"), (without_an_action, "action")):
        with pytest.raises(ValueError, match=rf"^episode 0 of train: [^$]*{said}"):
            write_rlds(tmp_path / "toy", toy_rlds.FEATURES, {"train": 1}, episode, workers=0, progress=False)


def test_an_episode_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    def broken(split: str, index: int) -> dict:
        raise RuntimeError("the arm fell off")

    with pytest.raises(RuntimeError, match="fell off"):
        write_rlds(tmp_path / "toy", toy_rlds.FEATURES, {"train": 1}, broken, workers=0, progress=False)
    assert not contents(tmp_path / "toy")


def test_an_episode_that_fails_ends_the_others(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    with start(tmp_path, marks, tmp_path / "toy" / "1.0.0", "one_fails", 60) as run:
        _, said = run.communicate(timeout=120)
    assert run.returncode == 1
    assert b"the arm fell off" in said
    assert len(list(marks.iterdir())) < 60, "the shards that had begun, and those held ready, were written all the same"


@given(st.lists(st.binary(max_size=300), max_size=5), st.data())
def test_framing_round_trips_and_notices_damage(tmp_path_factory, payloads: list[bytes], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("records") / "shard"
    whole = b"".join(records.frame(payload) for payload in payloads)
    path.write_bytes(whole)
    read = list(records.read(path))
    assert [record for _, record in read] == payloads
    assert all(whole[start : start + len(record)] == record for start, record in read)
    if whole:
        place = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(flipped)
        with pytest.raises(BadShardError, match="damaged"):
            list(records.read(path))
        boundaries = {0, *(start + len(record) + 4 for start, record in read)}
        cut = data.draw(st.integers(0, len(whole) - 1).filter(lambda n: n not in boundaries))
        path.write_bytes(whole[:cut])
        with pytest.raises(BadShardError, match="damaged"):
            list(records.read(path))
