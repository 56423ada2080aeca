"""Checkpoints that are whole or not there: real kills while they are written, a real limit of the disk."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openvla_lightning.callbacks.save_checkpoints import Checkpoint, CheckpointFiles
from openvla_lightning.checkpoint.disk import CheckpointWriteError, clear_unfinished, unfinished
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.checkpoint.sharded import ABOUT, is_sharded, read_about, read_weights
from openvla_lightning.checkpoint.training import Training
from openvla_lightning.parallel import FSDP

ROUNDS = 13
"""Of each of the four kinds."""


class Alone(FSDP):
    """The strategy's writer in a process group of one."""

    world_size = 1
    global_rank = 0

    def __init__(self, asynchronous: bool) -> None:
        super().__init__(wrap=[])
        self.write_in_background(asynchronous)
        self._writers = torch.distributed.new_group(backend="gloo")


def content(step: int) -> dict[str, Any]:
    """4 MB that say which step they are of, everywhere."""
    weights = {f"vla.{i}": torch.full((512, 512), float(step)) for i in range(4)}
    return {
        "global_step": step,
        "state_dict": weights,
        "optimizer_states": [{"state": {"w": torch.tensor(float(step))}}],
    }


def writer(kind: str, store: Path, asynchronous: bool) -> Any:
    if kind == "file":
        return CheckpointFiles(asynchronous)
    store.unlink(missing_ok=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    return Alone(asynchronous)


def finish(files: Any) -> None:
    files.finish_checkpoints() if isinstance(files, FSDP) else files.wait()


def keep_saving(kind: str, folder: Path, first: int, asynchronous: bool, limit: int | None) -> None:
    """Save, keeping one, until killed; with a `limit` in bytes for a file until that is hit (exit code 7)."""
    code = 1
    try:
        files = writer(kind, folder.with_suffix(f".{os.getpid()}"), asynchronous)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for step in range(first, first + 1000):
            files.save_checkpoint(content(step), folder / f"step_{step:06d}.ckpt")
            if step > first:
                files.remove_checkpoint(folder / f"step_{step - 1:06d}.ckpt")
        finish(files)
    except CheckpointWriteError as error:
        code = 7 if "The checkpoints before it are whole" in str(error) else 1
    finally:
        os._exit(code)


def load(path: Path) -> dict[str, Any]:
    assert Training().recognises(path)
    if path.is_dir():
        return {**read_about(path), "state_dict": read_weights(path)}
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["file", "shards"])
def test_killed_or_out_of_space_the_newest_checkpoint_is_whole(tmp_path: Path, kind: str, asynchronous: bool) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    first = 0
    full = 0
    for number in range(ROUNDS):
        limit = (None, 200_000, None, 3_000_000)[number % 4]
        process = os.fork()
        if not process:
            keep_saving(kind, folder, first, asynchronous, limit)
        if limit is None:
            while first == 0 and newest_checkpoint(folder.parent) is None:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.2))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if limit is not None:
            assert os.waitstatus_to_exitcode(status) == 7
            full += 1
        newest = newest_checkpoint(folder.parent)
        if newest is not None:
            found = load(newest)
            step = found["global_step"]
            assert newest.name == f"step_{step:06d}.ckpt"
            assert step >= first - 1, "what was whole stays"
            assert len(found["state_dict"]) == 4
            assert all(bool((tensor == step).all()) for tensor in found["state_dict"].values())
            for other in folder.glob("*.ckpt"):
                assert load(other)["global_step"] == int(other.stem.removeprefix("step_"))
            first = step + 1
        clear_unfinished(folder)
    assert full
    assert first


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    CheckpointFiles().save_checkpoint(content(3), tmp_path / "step_000003.ckpt")
    unfinished(tmp_path / "step_000004.ckpt").write_bytes(b"half")
    unfinished(tmp_path / "step_000005.ckpt").mkdir()
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003.ckpt"]


def test_a_folder_of_shards_without_its_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_000003.ckpt"
    path.mkdir()
    assert not is_sharded(path)
    with pytest.raises(CheckpointError, match=f"no {ABOUT}.*never finished"):
        describe(path)


def test_a_folder_of_shards_is_refused_where_one_process_trains(tmp_path: Path) -> None:
    path = tmp_path / "step_000003.ckpt"
    path.mkdir()
    torch.save({}, path / ABOUT)
    with pytest.raises(CheckpointError, match="trainer=fsdp"):
        CheckpointFiles().load_checkpoint(path)


def test_the_background_writes_what_was_there_when_it_was_asked(tmp_path: Path) -> None:
    files, state = CheckpointFiles(asynchronous=True), content(1)
    files.save_checkpoint(state, tmp_path / "step_000001.ckpt")
    for tensor in state["state_dict"].values():
        tensor.fill_(-1)
    files.wait()
    assert all(bool((tensor == 1).all()) for tensor in load(tmp_path / "step_000001.ckpt")["state_dict"].values())


def test_nothing_is_removed_for_a_checkpoint_that_was_not_written(tmp_path: Path) -> None:
    files = CheckpointFiles(asynchronous=True)
    files.save_checkpoint(content(1), tmp_path / "step_000001.ckpt")
    files.wait()
    unfinished(tmp_path / "step_000002.ckpt").mkdir()  # in the way, as a full disk would be
    files.save_checkpoint(content(2), tmp_path / "step_000002.ckpt")
    files.remove_checkpoint(tmp_path / "step_000001.ckpt")
    with pytest.raises(CheckpointWriteError, match=r"(?s)step_000002.*The checkpoints before it are whole"):
        files.wait()
    assert load(tmp_path / "step_000001.ckpt")["global_step"] == 1


ROTATES = """
import os, sys, time
from pathlib import Path
folder, parent, step = Path(sys.argv[1]), int(sys.argv[2]), 0
while os.getppid() == parent:
    step += 1
    (folder / f"step_{step:06d}.ckpt").touch()
    if step == 1: print("begun", flush=True)
    (folder / f"step_{step - 1:06d}.ckpt").unlink(missing_ok=True)
    time.sleep(0.001)
"""


def test_the_newest_checkpoint_is_found_while_a_training_removes_older_ones(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    command = [sys.executable, "-c", ROTATES, str(tmp_path / "checkpoints"), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == b"begun\n"
        try:
            for _ in range(500):
                newest_checkpoint(tmp_path)
        finally:
            training.kill()
    assert newest_checkpoint(tmp_path) == max(tmp_path.glob("checkpoints/step_*.ckpt"))


@pytest.mark.parametrize("keep", [0, -2])
def test_a_run_that_would_keep_no_checkpoint_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep={keep} would leave no checkpoint"):
        Checkpoint(str(tmp_path), every_n_train_steps=1, keep=keep)
