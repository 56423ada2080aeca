"""RLDS folders (tensorflow_datasets) without TensorFlow: indexed once, then read frame by frame.

The index holds all data except pixels, and the file, offset and length of each image. So one `pread` returns the image
of any step. This allows exact shuffles without a buffer, exact resumption, and statistics without reading images again.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from openvla_lightning.data.images import ImageMode, Pixels, load
from openvla_lightning.data.oxe.catalogue import dataset_spec
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.indexed import IndexedSource
from openvla_lightning.data.source.open_files import read_at
from openvla_lightning.data.source.rlds.array_records import ArrayRecords, is_array_record
from openvla_lightning.data.source.rlds.arrays import Layout
from openvla_lightning.data.source.rlds.building import build_index
from openvla_lightning.data.source.rlds.description import (
    check_description,
    read_features,
    stamps,
    version_folder,
)
from openvla_lightning.data.source.rlds.episodes import read_episodes
from openvla_lightning.data.source.rlds.shards import Shards
from openvla_lightning.data.source.store import is_url

log = logging.getLogger(__name__)


class RLDS(IndexedSource):
    """One RLDS dataset below `root`: `<root>/<name>/<version>/{dataset_info.json,features.json,*record-*}`.

    The arguments are those of `IndexedSource`.
    """

    def _set_up(self) -> None:
        remote = is_url(self.root)
        self.shards = Shards(str(self.root), self.name, self.cache_dir, self.cache_gb) if remote else None
        self.array_records = ArrayRecords()

    @cached_property
    def spec(self) -> DatasetSpec:
        """The dataset's description."""
        return self.given or dataset_spec(self.name)

    def missing(self) -> str | None:
        """Where the dataset was searched and how to get it; None if it is there.

        Takes milliseconds, and for a URL one request to the store.
        """
        if self.shards is not None:
            return self.shards.missing()
        try:
            if self.folder is not None:
                return None
        except PermissionError as error:
            return f"{self.name}: {error.filename} may not be read by this user: ask its owner for `chmod -R a+rX`"
        hint = self.spec.to_be_had(self.name, self.root)
        return f"{self.name}: no {Path(self.root) / self.name}/<version>/dataset_info.json. Get it: {hint}"

    @property
    def folder(self) -> Path | None:
        """The newest version's folder, or None; for a URL, the folder of its fetched files."""
        if self.shards is not None:
            return None if self.shards.missing() else self.shards.folder
        return version_folder(Path(self.root) / self.name)

    def check(self) -> None:
        """Compare the description with the dataset's metadata, in milliseconds.

        Raises:
            DescriptionError: it names cameras, actions, states or instructions that do not exist; the message lists
                those that do.
            BadShardError: features.json is missing or damaged.
        """
        if self.folder is not None:
            check_description(self.spec, read_features(self._folder))

    def encoded(self, role: str, step: int) -> bytes | None:
        """The image of `role` at `step` as the bytes of an image file; None if the dataset has none.

        These are the stored bytes, or a PPM file for images that are stored as plain numbers.

        Raises:
            BadShardError: the file is no longer the one that was indexed.
        """
        file, offset, length = self.index.images[role][step].tolist()
        if not length:
            return None
        name = self.index.files[file]
        stored = self._stored(name, offset, length)
        if len(stored) != length:
            raise BadShardError(f"{self._folder / name} ends before byte {offset + length}")
        layout = self._layouts.get(role)
        return stored if layout is None else layout.encode(stored)

    def _stored(self, name: str, offset: int, length: int) -> bytes:
        by_number = is_array_record(name)
        if self.shards is not None and by_number:
            with self.shards.held(name) as path:
                return self.array_records.read(path, offset, length, keep=False)
        if self.shards is not None:
            return self.shards.read(name, offset, length)
        path = self._folder / name

        def check(now: os.stat_result) -> None:
            self._check_unchanged(name, now)  # an overwritten file would give wrong bytes

        if by_number:
            read_at(path, 0, 0, check, self._stamps[name])
            return self.array_records.read(path, offset, length)
        return read_at(path, offset, length, check, self._stamps[name])

    def image(self, role: str, step: int, size: int, mode: ImageMode = "released") -> Pixels | None:
        """The image of `role` at `step`, uint8 [size, size, 3]; None if the dataset has none.

        Raises:
            BadShardError: the bytes are no image (the message names file and offset).
        """
        if (encoded := self.encoded(role, step)) is None:
            return None
        try:
            return load(encoded, size, mode)
        except ValueError as error:
            file, offset, _ = self.index.images[role][step].tolist()
            raise BadShardError(f"{self._folder / self.index.files[file]}: byte {offset}: {error}") from None

    def episodes(self, split: str) -> Iterator[dict[str, Any]]:
        """Whole recorded trajectories of a split; see `read_episodes`."""
        return read_episodes(self._folder, split)

    @cached_property
    def _folder(self) -> Path:
        if (folder := self.folder) is None:
            raise FileNotFoundError(self.missing())
        return folder

    @cached_property
    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Name of each file -> bytes and time of the last write, as found at the start; stores give only bytes."""
        if self.shards is not None:
            return {name: (size, 0) for name, size in self.shards.sizes.items()}
        return stamps(self._folder)

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        return {role: Layout.of(layout) for role, layout in self._fact("layouts").items()}

    def _build(self) -> tuple[Index, Mapping[str, NDArray[Any]], Mapping[str, Any]]:
        index, layouts = build_index(
            self._folder, self.spec, self._stamps, self._kept, self.workers, self.shards,
            bad_trajectories=self.bad_trajectories, check_images=self.check_images,
        )  # fmt: skip
        return index, {}, {"layouts": {role: asdict(layout) for role, layout in layouts.items()}}
