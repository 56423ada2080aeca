"""Checkpoints on disk: written under a temporary name and then renamed, optionally in the background."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

log = logging.getLogger(__name__)


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; earlier ones are complete."""

    def __init__(self, path: str | Path, reason: object) -> None:
        super().__init__(
            f"cannot write the checkpoint {path}: {reason}\n  The checkpoints before it are whole. If the disk is "
            "full, make room (callbacks.checkpoint.keep=2 keeps the newest two only); then go on with ckpt_path=last."
        )


def unfinished(path: Path) -> Path:
    """The temporary name of a checkpoint while it is written or removed; no command takes it for a checkpoint."""
    return path.with_name(f".{path.name}.unfinished")


def clear_unfinished(folder: Path) -> None:
    """Remove incomplete checkpoints of killed processes; call this only while no process writes to `folder`."""
    for left in folder.glob(".*.unfinished"):
        _delete(left)


def commit(beside: Path, path: Path) -> None:
    """Rename a complete checkpoint to its final name, durably."""
    if path.is_dir():
        remove(path)
    beside.replace(path)
    sync(path.parent)
    log.info(f"Checkpoint written: {path}")


def remove(path: Path) -> None:
    """Remove a checkpoint; after a kill, the rest does not count as a checkpoint."""
    if path.exists():
        _delete(unfinished(path))
        path.replace(unfinished(path))
        _delete(unfinished(path))


def write(content: dict[str, Any], path: Path) -> None:
    """Save and flush to the disk."""
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Queue:
    """Runs jobs one after the other: in a background thread if `asynchronous`, otherwise at once.

    When a job fails, the waiting ones are dropped, so that no checkpoint is removed for one that was not written.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.pool = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.waiting: list[Future[None]] = []
        self.failed = False

    def add(self, job: Callable[[], None]) -> None:
        """Run `job`, or queue it."""
        if self.pool is None:
            job()
        else:
            self.waiting.append(self.pool.submit(self._run, job))

    def _run(self, job: Callable[[], None]) -> None:
        if not self.failed:
            try:
                job()
            except BaseException:
                self.failed = True
                raise

    def wait(self) -> None:
        """Return when all jobs are done; raise the first error."""
        waiting, self.waiting = self.waiting, []
        errors = [error for future in waiting if (error := future.exception()) is not None]
        self.failed = False
        if errors:
            raise errors[0]


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write one file atomically.

    Raises:
        CheckpointWriteError: when it cannot be written.
    """
    beside = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(checkpoint, beside)
        commit(beside, path)
    except (OSError, RuntimeError) as error:  # torch's writer wraps the OSError
        with suppress(OSError):
            _delete(beside)
        raise CheckpointWriteError(path, error) from error


def on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy whose tensors training does not change; tensors that share memory share it in the copy, too."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    copied: dict[str, Any] = tree_map_only(Tensor, copy, checkpoint)
    return copied


def fingerprint(path: str | Path) -> str | None:
    """sha256 of a file, or of a folder's file names and hashes; None if it is not on this disk (a hub id)."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    if not path.is_dir():
        return None
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path)} {fingerprint(file)}\n".encode())
    return total.hexdigest()
