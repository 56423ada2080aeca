"""LeRobot datasets (v2.0, v2.1, v3.0) without the lerobot package: indexed once, then read frame by frame."""

import base64
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import ImageMode, Pixels, decode, fit
from openvla_lightning.data.oxe.catalogue import dataset_spec
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.indexed import IndexedSource
from openvla_lightning.data.source.lerobot.building import Files, build
from openvla_lightning.data.source.lerobot.description import camera_features, check_description
from openvla_lightning.data.source.lerobot.film import Film
from openvla_lightning.data.source.lerobot.indexing import PACKED, place
from openvla_lightning.data.source.lerobot.metadata import INFO, Metadata, read_info
from openvla_lightning.data.source.lerobot.packets import Video
from openvla_lightning.data.source.lerobot.remote import RemoteFiles, download, downloaded
from openvla_lightning.data.source.open_files import read_at
from openvla_lightning.data.source.store import is_url
from openvla_lightning.runtime.files import below

log = logging.getLogger(__name__)


class LeRobot(IndexedSource):
    """One LeRobot dataset: a folder with `meta/info.json`.

    Without `path` in its description, it is the folder of its name below `root`. The arguments are those of
    `IndexedSource`.
    """

    def _set_up(self) -> None:
        self.place = self._described.path or self.name
        if is_url(self.root) and not is_url(self.place):
            self.place = f"{str(self.root).rstrip('/')}/{self.place}"
        self.remote = RemoteFiles(self.place, self.cache_dir, self.cache_gb) if is_url(self.place) else None
        self._downloaded = False

    @cached_property
    def spec(self) -> DatasetSpec:
        """The dataset's description; without a control rate, the dataset's own is used.

        Raises:
            BadShardError: the folder is no LeRobot dataset of a supported version.
        """
        spec, folder = self._described, self.folder
        if folder is None or spec.control_hz is not None:
            return spec
        return replace(spec, control_hz=self._info(folder).fps)

    def check(self) -> None:
        """Compare the description with the dataset's metadata, in milliseconds.

        Raises:
            DescriptionError: it names cameras, actions, states or instructions that do not exist; the message lists
                those that do.
            BadShardError: the dataset's version is not supported, or `info.json` is damaged.
        """
        if (folder := self.folder) is not None:
            check_description(self._info(folder), self._described)

    def missing(self) -> str | None:
        """Where the dataset was searched and how to get it; None if it is there or can be downloaded.

        Takes milliseconds, and for a URL one request to the store.
        """
        if self.remote is not None:
            return self.remote.missing()
        if self._described.hub is not None:
            if self.folder is None and os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
                return f"{self.name}: {self._described.hub} was not downloaded yet, and HF_HUB_OFFLINE is set"
            return None
        if self.folder is not None:
            return None
        hint = f"Get it: {spec.where}" if (spec := self._described).where else "Say where it is"
        sought = Path(self.root, self.place).expanduser() / INFO
        return f"{self.name}: no {sought}. {hint} (data.datasets.{self.name}.path)"

    @property
    def folder(self) -> Path | None:
        """The dataset's folder, for a URL the folder of its fetched files; None if there is no dataset."""
        if self.remote is not None:
            return None if self.remote.missing() else self.remote.folder
        if (hub := self._described.hub) is not None:
            return downloaded(hub)
        folder = Path(self.root).expanduser() / Path(self.place).expanduser()
        return folder if (folder / INFO).exists() or (folder / "meta_data").is_dir() else None

    def prepare(self) -> None:
        """Index the dataset, if not done before, in one pass over its files. A hub dataset is downloaded first.

        Raises:
            FileNotFoundError: the dataset is not there.
            BadShardError: a file is missing or damaged, a value is not finite, or an episode contradicts `meta/`; the
                message names file and episode. With `bad_trajectories="skip"`, only if nothing is left.
        """
        if (hub := self._described.hub) is not None and not self._downloaded:
            cameras = camera_features(read_info(download(hub)), self._described)
            download(hub, [*cameras.values()])
            vars(self).pop("spec", None)
            self._downloaded = True
        super().prepare()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Differences between the dataset's stored statistics and those of its data."""
        return tuple(self._fact("remarks"))

    @property
    def episode_numbers(self) -> list[int]:
        """`episode_index` of each trajectory of the index."""
        return list(self._fact("episodes"))

    def encoded(self, role: str, step: int) -> bytes | None:
        """The stored bytes of the picture of `role` at `step`; None if there is none, or it is a video frame.

        Raises:
            BadShardError: the file is no longer the one that was indexed.
        """
        file, offset, length = self.index.images[role][step].tolist()
        if not length or not self._is_packed(file):
            return None
        return self._read(file, offset, length)

    def pixels(self, role: str, step: int) -> Pixels | None:
        """The recorded picture of `role` at `step`, uint8 [H, W, 3]; None if there is none.

        Raises:
            BadShardError: it cannot be decoded (the message names the file), or the file changed.
        """
        file, offset, length = self.index.images[role][step].tolist()
        if not length:
            return None
        if not self._is_packed(file):
            return self.film.frame(file, offset)
        try:
            return decode(self._read(file, offset, length))
        except ValueError as error:
            raise BadShardError(f"{self._path(file)}: byte {offset}: {error}") from None

    def image(self, role: str, step: int, size: int, mode: ImageMode = "released") -> Pixels | None:
        """The picture of `role` at `step`, uint8 [size, size, 3]; None if there is none."""
        pixels = self.pixels(role, step)
        return None if pixels is None else fit(pixels, size, mode)

    def run(self, role: str, steps: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """Many pictures of a role, in the order of `steps` if the files allow it: step and uint8 [H, W, 3].

        Neighbouring frames of a video are decoded once. Steps without a picture are left out.
        """
        places = self.index.images[role][list(steps)]
        for file in dict.fromkeys(places[places[:, 2] > 0, 0].tolist()):
            here = {int(places[i, 1]): steps[i] for i in np.flatnonzero(places[:, 0] == file).tolist()}
            if self._is_packed(file):
                for step in here.values():
                    pixels = self.pixels(role, step)
                    assert pixels is not None
                    yield step, pixels
            else:
                yield from ((here[offset], pixels) for offset, pixels in self.film.frames(file, list(here)))

    def chroma_repeated(self, role: str, step: int) -> bool:
        """Whether every 2 x 2 pixels of a picture that was just read have the same chroma, as in 4:2:0 videos."""
        file = int(self.index.images[role][step, 0])
        return not self._is_packed(file) and self.film.chroma_repeated(file)

    def where(self, step: int) -> str:
        """The place of a step, in words."""
        index = self.index
        trajectory = int(index.trajectory[step])
        episode, frame = self._fact("episodes")[trajectory], step - int(index.bounds[trajectory])
        files = dict.fromkeys(index.files[places[step, 0]] for places in index.images.values() if places[step, 2])
        return f"episode {episode}, frame {frame}" + (f" of {', '.join(files)}" if files else "")

    @cached_property
    def film(self) -> Film:
        """The dataset's videos."""
        index, videos = self.index, self._fact("videos")
        packets = np.load(self._home / "packets.npy", mmap_mode="r").view(np.ndarray)
        known = {one["path"]: Video(**one | {"extradata": base64.b64decode(one["extradata"])}) for one in videos}
        return Film(
            str(self._home), [known.get(name, Video(name)) for name in index.files], packets, self._read, self._name
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "film"}

    def _is_packed(self, file: int) -> bool:
        """Whether a file of the index holds pictures as they are, and is no video."""
        return self.index.files[file].endswith(PACKED)

    def _info(self, folder: Path) -> Metadata:
        try:
            return read_info(folder)
        except BadShardError as error:
            raise BadShardError(f"{self.name}: {error}") from None

    @property
    def _described(self) -> DatasetSpec:
        return self.given or dataset_spec(self.name)

    @cached_property
    def _folder(self) -> Path:
        if (folder := self.folder) is None:
            raise FileNotFoundError(self.missing() or f"{self.name} was not downloaded yet: `prepare` does it")
        return folder

    @cached_property
    def _pictures(self) -> Path:
        """The folder of pictures copied from parquet files; it does not depend on the dataset's description."""
        data = sorted((name, stamp) for name, stamp in self._stamps.items() if name.startswith("data/"))
        key = hashlib.sha256(repr(data).encode()).hexdigest()
        return self._home.parent / f"pictures_{key[:16]}"

    @cached_property
    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Name of each file -> bytes and time of the last write, as found at the start; stores give only bytes."""
        folder = self._folder
        if self.remote is not None:
            return {name: (size, 0) for name, size in self.remote.names.items()}
        paths = [path for part in ("meta", "data", "videos") for path in below(folder / part) if path.is_file()]
        stats = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _path(self, file: int) -> Path:
        return place(self._folder, self._pictures, self.index.files[file])

    def _name(self, file: int) -> str:
        return f"{self.name}: {self._path(file)}"

    def _read(self, file: int, offset: int, length: int) -> bytes:
        path, name = self._path(file), self.index.files[file]
        if self.remote is not None and not name.endswith(PACKED):
            return self.remote.read(name, offset, length)
        try:
            found = read_at(path, offset, length, partial(self._check_unchanged, name), self._stamps.get(name))
        except OSError as error:
            raise BadShardError(f"{self.name}: {path} cannot be read: {error.strerror}") from None
        if len(found) != length:
            raise BadShardError(f"{path} was cut short after it was indexed: start again, so that it is indexed anew")
        return found

    def _build(self) -> tuple[Index, Mapping[str, NDArray[Any]], Mapping[str, Any]]:
        sizes = {name: size for name, (size, _) in self._stamps.items()}
        files = Files(self.name, self._folder, sizes, self._pictures, self._stamps, self._kept, self.remote)
        return build(
            files, self.spec, self.workers, bad_trajectories=self.bad_trajectories, check_images=self.check_images
        )
