"""All data of a dataset that training needs except pixels, as memory-mapped arrays, and the places of the pixels."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.runtime.files import readable, user_caches, writable, write_json, written_whole

VERSION = 4
ARRAYS = ("action", "proprio", "bounds", "split", "instruction", "shards", "sizes")
WORDS = ("splits", "instructions", "files", "skipped")


@dataclass(frozen=True, eq=False)
class Index:
    """All steps of all splits of one dataset, trajectory by trajectory.

    Attributes:
        action: float32 [N, D], standardised, not normalised.
        proprio: float32 [N, P]; P is 0 if none is read.
        bounds: int64 [K + 1]; trajectory k holds the steps bounds[k] .. bounds[k + 1].
        split: int16 [K], the place of each trajectory's split in `splits`.
        instruction: int32 [N], the place of each step's instruction in `instructions`.
        images: role -> int64 [N, 3]: place of the file in `files`, position, and length of the encoded image; length 0
            means a black image. The position is a byte offset, or in array_record files
            `record number * SPAN + offset in the record`.
        splits, instructions, files: the lists that these places refer to.
        shards: int64 [F + 1]; the images of steps shards[f] .. shards[f + 1] are in file f.
        sizes: int64 [F], bytes of each file.
        skipped: trajectories that could not be read and were left out: file, number in it, reason.
        folder: folder in which the index is stored; None: it is in memory only.
    """

    action: NDArray[np.float32]
    proprio: NDArray[np.float32]
    bounds: NDArray[np.int64]
    split: NDArray[np.int16]
    instruction: NDArray[np.int32]
    images: Mapping[str, NDArray[np.int64]]
    splits: tuple[str, ...]
    instructions: tuple[str, ...]
    files: tuple[str, ...] = ()
    shards: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    skipped: tuple[dict[str, Any], ...] = ()
    folder: Path | None = None

    @property
    def num_steps(self) -> int:
        """Steps in all splits."""
        return len(self.action)

    @property
    def num_trajectories(self) -> int:
        """Trajectories in all splits, empty ones included."""
        return len(self.split)

    @cached_property
    def trajectory(self) -> NDArray[np.int32]:
        """int32 [N]: the trajectory of each step."""
        return np.repeat(np.arange(self.num_trajectories, dtype=np.int32), np.diff(self.bounds))

    def where(self, step: int) -> str:
        """The place of a step, in words: its trajectory, its number in it, and the file."""
        trajectory = int(self.trajectory[step])
        shard = int(np.searchsorted(self.shards, step, side="right")) - 1
        file = f" of {self.files[shard]}" if self.files else ""
        return f"trajectory {trajectory}, step {step - self.bounds[trajectory]}{file}"

    def save(self, folder: Path, arrays: Mapping[str, NDArray[Any]] | None = None, /, **files: str) -> None:
        """Write the index and further arrays and texts to `folder` atomically.

        No process ever sees an incomplete index, and a full disk keeps no part of it.

        Raises:
            OSError: it cannot be written; the message names `folder`.
        """
        with suppress(FileExistsError), written_whole(folder, folder=True) as beside:  # another process wrote the same
            for name in (*ARRAYS, "trajectory"):
                np.save(beside / f"{name}.npy", getattr(self, name))
            for name, array in (arrays or {}).items():
                np.save(beside / f"{name}.npy", array)
            for role, places in self.images.items():
                np.save(beside / f"image_{role}.npy", places)
            words: dict[str, Any] = {name: getattr(self, name) for name in WORDS}
            described = json.dumps(words | {"cameras": list(self.images)}, ensure_ascii=False)
            (beside / "index.json").write_text(described, encoding="utf-8")
            for name, content in files.items():
                (beside / f"{name}.json").write_text(content, encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map what `save` wrote."""
        words = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        arrays: dict[str, Any] = {name: _mapped(folder / f"{name}.npy") for name in ARRAYS}
        images = {role: _mapped(folder / f"image_{role}.npy") for role in words["cameras"]}
        arrays |= {name: tuple(words[name]) for name in WORDS}
        index = cls(**arrays, images=images, folder=folder)
        vars(index)["trajectory"] = _mapped(folder / "trajectory.npy")  # instead of computing it
        return index

    def keep(self, name: str, steps: NDArray[np.int32], facts: dict[str, Any]) -> NDArray[np.int32]:
        """Store a selection of steps, and facts about it, beside the index; return the steps memory-mapped.

        If the folder is not writable, the steps are returned unchanged.
        """
        if self.folder is None or not os.access(self.folder, os.W_OK):
            return steps
        path = self.folder / f"{name}.npy"
        with written_whole(path) as beside, beside.open("wb") as file:
            np.save(file, steps)
        write_json(self.folder / f"{name}.json", facts)
        return _mapped(path)

    def kept(self, name: str) -> tuple[NDArray[np.int32], dict[str, Any]] | None:
        """The selection and facts that were stored as `name`; None if there are none."""
        if self.folder is None or not readable(self.folder / f"{name}.json"):
            return None
        return _mapped(self.folder / f"{name}.npy"), json.loads(
            (self.folder / f"{name}.json").read_text(encoding="utf-8")
        )

    def __reduce__(self) -> Any:
        # A worker process maps the same files instead of receiving copies.
        return (Index.open, (self.folder,)) if self.folder else object.__reduce__(self)


def _mapped(path: Path) -> NDArray[Any]:
    array = np.load(path, mmap_mode="r")
    return array.view(np.ndarray) if array.size else np.asarray(array)


def home_of(key: str, dataset: Path, name: str, cache_dir: Path | None = None) -> Path:
    """The folder of a dataset's index `key`, existing or new: in the dataset's folder, or in a cache.

    Args:
        key: hash of everything that the index depends on.
        dataset: the folder of the dataset's version.
        name: the dataset's name.
        cache_dir: a cache to use instead of the user's.

    Raises:
        PermissionError: there is no such index, and no writable place for one.
    """
    beside = dataset / ".openvla_lightning"
    own = f"{dataset.name}_{hashlib.sha256(str(dataset.resolve()).encode()).hexdigest()[:8]}"  # unique to this folder
    caches = [cache / name / own for cache in ([cache_dir] if cache_dir is not None else user_caches())]
    for folder in (beside, *caches):
        if readable(folder / key / "index.json"):
            return folder / key
    shared = os.access(beside if beside.is_dir() else dataset, os.W_OK)
    for folder in (*[beside] * shared, *caches):
        if writable(folder):
            return folder / key
    raise PermissionError(
        f"the index of {name} can be kept neither in {beside} nor in {', '.join(map(str, caches))}: nothing can be "
        "written there. Name a folder for it with data.source.cache_dir=..."
    )
