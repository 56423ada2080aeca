"""What training needs of a dataset besides pixels, as memory-mapped arrays; and where the pixels are."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

VERSION = 3
ARRAYS = ("action", "proprio", "bounds", "split", "instruction", "shards", "sizes")
WORDS = ("splits", "instructions", "files", "skipped")


@dataclass(frozen=True, eq=False)
class Index:
    """All steps of all splits of one dataset, trajectory by trajectory.

    Attributes:
        action: float32 [N, D], standardised, not normalised.
        proprio: float32 [N, P]; P is 0 where none is read.
        bounds: int64 [K + 1]; trajectory k holds the steps bounds[k] .. bounds[k + 1].
        split: int16 [K], the place of each trajectory's split in `splits`.
        instruction: int32 [N], the place of each step's instruction in `instructions`.
        images: role -> int64 [N, 3]: place of the file in `files`, byte offset (in array_record files: of record r from
            r * array_records.SPAN on), length of the encoded image; length 0
            stands for a black one.
        splits, instructions, files: what the numbers point to.
        shards: int64 [F + 1]; the images of the steps shards[f] .. shards[f + 1] lie in file f.
        sizes: int64 [F], bytes of each file.
        skipped: trajectories that could not be read and were left out: file, number in it, reason.
        folder: where this is stored, if it is.
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
        """int32 [N]: which trajectory each step belongs to."""
        return np.repeat(np.arange(self.num_trajectories, dtype=np.int32), np.diff(self.bounds))

    def save(self, folder: Path, arrays: Mapping[str, NDArray[Any]] | None = None, /, **files: str) -> None:
        """Write everything to `folder` at once, with more arrays and texts: nobody ever sees half an index."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        for name in (*ARRAYS, "trajectory"):
            np.save(partial / f"{name}.npy", getattr(self, name))
        for name, array in (arrays or {}).items():
            np.save(partial / f"{name}.npy", array)
        for role, places in self.images.items():
            np.save(partial / f"image_{role}.npy", places)
        words: dict[str, Any] = {name: getattr(self, name) for name in WORDS}
        (partial / "index.json").write_text(json.dumps(words | {"cameras": list(self.images)}, ensure_ascii=False))
        for name, content in files.items():
            (partial / f"{name}.json").write_text(content)
        try:
            partial.replace(folder)
        except OSError:  # somebody else was faster; theirs is the same
            shutil.rmtree(partial)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map what `save` wrote."""
        words = json.loads((folder / "index.json").read_text())
        arrays: dict[str, Any] = {name: _mapped(folder / f"{name}.npy") for name in ARRAYS}
        images = {role: _mapped(folder / f"image_{role}.npy") for role in words["cameras"]}
        arrays |= {name: tuple(words[name]) for name in WORDS}
        index = cls(**arrays, images=images, folder=folder)
        vars(index)["trajectory"] = _mapped(folder / "trajectory.npy")  # instead of working it out
        return index

    def keep(self, name: str, steps: NDArray[np.int32], facts: dict[str, Any]) -> NDArray[np.int32]:
        """Put a selection of steps, and what there is to say about it, beside the index; return it memory-mapped.

        Where nothing may be written, as in somebody else's folder, the steps are returned as they are.
        """
        if self.folder is None or not os.access(self.folder, os.W_OK):
            return steps
        with NamedTemporaryFile(dir=self.folder, delete=False) as file:
            np.save(file, steps)
        Path(file.name).replace(self.folder / f"{name}.npy")
        save_json(self.folder / f"{name}.json", facts)
        return _mapped(self.folder / f"{name}.npy")

    def kept(self, name: str) -> tuple[NDArray[np.int32], dict[str, Any]] | None:
        """What was put under `name`, if anything was."""
        if self.folder is None or not (self.folder / f"{name}.json").exists():
            return None
        return _mapped(self.folder / f"{name}.npy"), json.loads((self.folder / f"{name}.json").read_text())

    def __reduce__(self) -> Any:
        # A worker process maps the same files instead of receiving copies.
        return (Index.open, (self.folder,)) if self.folder else object.__reduce__(self)


def save_json(path: Path, content: Any) -> None:
    """Write `content` to `path` at once."""
    with NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file, indent=1)
    Path(file.name).replace(path)


def _mapped(path: Path) -> NDArray[Any]:
    array = np.load(path, mmap_mode="r")
    return array.view(np.ndarray) if array.size else np.asarray(array)


def cache_folder(dataset: Path, name: str) -> Path:
    """Where to keep the index of the dataset in folder `dataset`: inside it, or in the user's cache when read-only."""
    beside = dataset / ".openvla_lightning"
    if beside.is_dir() or os.access(dataset, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "openvla_lightning" / name / dataset.name
