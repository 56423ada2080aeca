"""Video frames and PNGs as JPEG records, which are made once and then read like those of an RLDS dataset."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import JPEG, ImageMode, Pixels, decode, encode, load
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.indexed import IndexedSource
from openvla_lightning.data.source.open_files import read_at
from openvla_lightning.data.source.processes import run_jobs
from openvla_lightning.runtime.files import written_whole
from openvla_lightning.runtime.progress import Bar
from openvla_lightning.statistics import DatasetStatistics

Cache = Literal["none", "jpeg"]

STEPS_PER_FILE = 2048
PARALLEL_FROM = 4 * STEPS_PER_FILE


@dataclass(frozen=True)
class Piece:
    """Steps [first, last) of a camera, in whole trajectories; each piece becomes one file of records."""

    role: str
    path: Path
    first: int
    last: int


class Transcoded(Source):
    """A dataset whose pictures are read from JPEG records (quality 95, chroma as in the video) instead of its videos.

    The records lie beside the dataset's index. `prepare` makes them piece by piece; a piece gets its final name when it
    is complete, so that an interrupted pass is resumed. All other data comes from the dataset itself.

    Args:
        source: the dataset.
        roles: the cameras that are transcoded; others are read from the dataset.
    """

    def __init__(self, source: IndexedSource, roles: Sequence[str]) -> None:
        self.source, self.name = source, source.name
        self.roles = tuple(role for role in roles if source.spec.cameras.get(role))

    @property
    def spec(self) -> DatasetSpec:
        """The dataset's description."""
        return self.source.spec

    @property
    def index(self) -> Index:
        """All data of every step except pixels."""
        return self.source.index

    @property
    def statistics(self) -> DatasetStatistics:
        """Statistics of actions and proprioception over all splits, as released."""
        return self.source.statistics

    @property
    def remarks(self) -> tuple[str, ...]:
        """Further remarks on the files for the data report."""
        return self.source.remarks

    def where(self, step: int) -> str:
        """The place of a step, in words."""
        return self.source.where(step)

    def missing(self) -> str | None:
        """What is missing and where to get it; None if nothing is missing."""
        return self.source.missing()

    def check(self) -> None:
        """Raise ValueError if the description names something that the files lack."""
        self.source.check()

    def measure(self, steps: NDArray[np.int32]) -> DatasetStatistics:
        """Statistics of the given steps only."""
        return self.source.measure(steps)

    def prepare(self) -> None:
        """Index the dataset and transcode its pictures, if not done before.

        Raises:
            BadShardError: a frame cannot be decoded, or the disk has no room for the records.
        """
        self.source.prepare()
        pieces = [piece for role in self.roles for piece in self._pieces(role)]
        missing = [piece for piece in pieces if not piece.path.exists()]
        if not missing:
            return
        self._home.mkdir(parents=True, exist_ok=True)
        self._check_space(missing)
        total, left = (sum(piece.last - piece.first for piece in some) for some in (pieces, missing))
        workers = 0 if left < PARALLEL_FROM else self.source.workers
        workers = min(len(missing), (os.cpu_count() or 1) if workers is None else workers)
        with Bar(f"{self.name} into JPEG", total, "frames", done=total - left) as bar:
            if workers < 2:
                for piece in missing:
                    self._transcode(piece, bar.advance)
                return
            run_jobs(self._transcode, ((piece,) for piece in missing), workers, bar, total - left)

    def encoded(self, role: str, step: int) -> bytes | None:
        """The JPEG of the picture of `role` at `step`; None if there is none.

        Raises:
            BadShardError: the records are damaged.
        """
        if role not in self.roles:
            return self.source.encoded(role, step)
        piece, (offset, length) = self._place(role, step)
        if not length:
            return None
        found = read_at(piece.path, offset, length, _same)
        if len(found) != length:
            raise BadShardError(f"{piece.path} was cut short: remove {self._home}, so that it is made anew")
        return found

    def pixels(self, role: str, step: int) -> Pixels | None:
        """The picture of `role` at `step` in its recorded size, uint8 [H, W, 3]; None if there is none."""
        if role not in self.roles:
            return self.source.pixels(role, step)
        encoded = self.encoded(role, step)
        return None if encoded is None else decode(encoded)

    def image(self, role: str, step: int, size: int, mode: ImageMode = "released") -> Pixels | None:
        """The picture of `role` at `step`, uint8 [size, size, 3]; None if there is none."""
        if role not in self.roles:
            return self.source.image(role, step, size, mode)
        encoded = self.encoded(role, step)
        return None if encoded is None else load(encoded, size, mode)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @cached_property
    def _home(self) -> Path:
        """The folder of the records; it does not depend on the description of actions and states."""
        index = self.index
        key = hashlib.sha256(self.source.files_key.encode())
        for text in (index.files, index.bounds.tobytes()):
            key.update(repr(text).encode())
        if index.folder is None:
            raise ValueError(f"{self.name} has no folder to keep JPEG records in")
        return index.folder.parent / f"jpeg_{key.hexdigest()[:16]}"

    @cached_property
    def _pieces_of(self) -> dict[str, list[Piece]]:
        return {}

    def _pieces(self, role: str) -> list[Piece]:
        if role not in self._pieces_of:
            bounds = self.index.bounds
            cuts = np.searchsorted(bounds, np.arange(STEPS_PER_FILE, self.index.num_steps, STEPS_PER_FILE))
            edges = np.unique(np.concatenate([[0], bounds[cuts], [self.index.num_steps]])).tolist()
            key = hashlib.sha256(np.ascontiguousarray(self.index.images[role]).tobytes()).hexdigest()[:8]
            self._pieces_of[role] = [
                Piece(role, self._home / f"{role}_{key}_{i:05d}.jpegs", first, last)
                for i, (first, last) in enumerate(pairwise(edges))
            ]
        return self._pieces_of[role]

    @cached_property
    def _tables(self) -> dict[str, tuple[list[int], list[NDArray[np.int64]]]]:
        found = {}
        for role in self.roles:
            pieces = self._pieces(role)
            found[role] = [piece.first for piece in pieces], [_places(piece) for piece in pieces]
        return found

    def _place(self, role: str, step: int) -> tuple[Piece, list[int]]:
        starts, tables = self._tables[role]
        number = int(np.searchsorted(starts, step, side="right")) - 1
        return self._pieces(role)[number], tables[number][step - starts[number]].tolist()

    def _transcode(self, piece: Piece, advance: Any) -> None:
        places = np.zeros((piece.last - piece.first, 2), np.int64)
        with written_whole(piece.path) as beside, beside.open("wb") as file:
            for step, encoded in self._encoded(piece):
                places[step - piece.first] = file.tell(), len(encoded)
                file.write(encoded)
                advance()
            file.write(places.tobytes())  # at the end, so that a file contains its table

    def _encoded(self, piece: Piece) -> Iterator[tuple[int, bytes]]:
        for step, pixels in self.source.run(piece.role, range(piece.first, piece.last)):
            stored = self.source.encoded(piece.role, step)
            if stored is None or not stored.startswith(JPEG):
                stored = encode(pixels, self.source.chroma_repeated(piece.role, step))
            yield step, stored

    def _check_space(self, missing: Sequence[Piece]) -> None:
        if (first := next(iter(self._encoded(missing[0])), None)) is None:
            return
        needed = len(first[1]) * sum(piece.last - piece.first for piece in missing)
        if needed > (free := shutil.disk_usage(self._home).free):
            raise BadShardError(
                f"{self.name}: data.cache=jpeg needs about {needed / 1e9:.1f} GB in {self._home}; "
                f"{free / 1e9:.1f} GB are free"
            )


def _same(now: os.stat_result) -> None:
    """No check: records are our own and never change."""


def _places(piece: Piece) -> NDArray[np.int64]:
    steps = piece.last - piece.first
    with piece.path.open("rb") as file:
        file.seek(-16 * steps, os.SEEK_END)
        return np.frombuffer(file.read(), np.int64).reshape(steps, 2)


def cached(source: Source, cache: Cache, roles: Sequence[str]) -> Source:
    """`source`; with `cache="jpeg"`, its pictures are read from JPEG records unless they are records already."""
    return Transcoded(source, roles) if cache == "jpeg" and isinstance(source, IndexedSource) else source
