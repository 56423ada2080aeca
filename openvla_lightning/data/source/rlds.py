"""RLDS folders (tensorflow_datasets) without TensorFlow: indexed once, then read frame by frame.

The index holds everything but pixels, and for each image its file, offset and length, so that any step of a dataset is
one `pread` away: exact shuffles without a buffer, exact resumption, and statistics without touching images again.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from openvla_lightning.data.images import ImageMode, Pixels, load
from openvla_lightning.data.oxe.registry import DatasetSpec, dataset_spec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source import index as index_module
from openvla_lightning.data.source.array_records import ArrayRecords, is_array_record
from openvla_lightning.data.source.episodes import read_episodes
from openvla_lightning.data.source.index import Index, save_json
from openvla_lightning.data.source.indexing import BadTrajectories, Job, Shard, join, read_shard
from openvla_lightning.data.source.processes import worker_pool
from openvla_lightning.data.source.records import BadShardError
from openvla_lightning.data.source.shards import Shards, is_url, newest
from openvla_lightning.statistics import DatasetStatistics

log = logging.getLogger(__name__)

OPEN_FILES = 256
READABLE = ("tfrecord", "array_record")
PARALLEL_FROM = 256 * 2**20


class RLDS(Source):
    """One RLDS dataset below `root`: `<root>/<name>/<version>/{dataset_info.json,features.json,*record-*}`.

    Args:
        root: the data directory, or any URL that fsspec understands: gs://, s3://, https://, file://.
        name: the dataset's name; its folder.
        spec: what to make of it; None: what is registered under `name`.
        workers: processes that index; None: one per core for large datasets, none for small ones.
        bad_trajectories: what to do with those that cannot be read: `error` stops at the first, `skip` leaves them
            out and lists every one in the index and its data report.
        check_images: decode every image while indexing, instead of looking at its first and last bytes.
        cache_dir: where the files of a URL are kept, and what is made of them; None: the user's cache.
        cache_gb: gigabytes of shards kept there at once, over all datasets.

    Raises:
        ValueError: `bad_trajectories` is neither; `cache_gb` is not above 0.
    """

    def __init__(
        self,
        root: str | Path,
        name: str,
        spec: DatasetSpec | None = None,
        workers: int | None = None,
        bad_trajectories: BadTrajectories = "error",
        check_images: bool = False,
        cache_dir: str | Path | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        if bad_trajectories not in get_args(BadTrajectories):
            raise ValueError(f"data.source.bad_trajectories={bad_trajectories}: choose error or skip")
        self.bad_trajectories, self.check_images = bad_trajectories, check_images
        self.root, self.name, self.given, self.workers = root, name, spec, workers
        self.shards = Shards(str(root), name, cache_dir, cache_gb) if is_url(root) else None
        self.descriptors: OrderedDict[int, int] = OrderedDict()
        self.array_records = ArrayRecords()

    @cached_property
    def spec(self) -> DatasetSpec:
        """What is known of the dataset."""
        return self.given or dataset_spec(self.name)

    def missing(self) -> str | None:
        """Say where the dataset was looked for and how to get it; None when it is there.

        Takes milliseconds, and for a URL one question to the store.
        """
        if self.shards is not None:
            return self.shards.missing()
        if self.folder is not None:
            return None
        hint = self.spec.where.format(name=self.name, root=self.root) or "put its RLDS folder there"
        return f"{self.name}: no {Path(self.root) / self.name}/<version>/dataset_info.json. Get it: {hint}"

    @property
    def folder(self) -> Path | None:
        """The newest version's folder, or None; of a URL, where it is kept."""
        if self.shards is not None:
            return None if self.shards.missing() else self.shards.folder
        dataset = Path(self.root) / self.name
        found = {path.parent.name: path.parent for path in dataset.glob("*/dataset_info.json")}
        if (dataset / "dataset_info.json").exists():
            found[self.name] = dataset
        return found[version] if (version := newest([*found])) is not None else None

    def prepare(self) -> None:
        """Index the dataset unless that was done: one pass over its files.

        Raises:
            FileNotFoundError: the dataset is not there.
            BadShardError: a file is damaged, an action is not finite, a key is missing, an image is cut short; with
                file and trajectory. With `bad_trajectories="skip"`, only when nothing is left.
        """
        if not (self._home / "index.json").exists():
            index = self._build()
            released = self._measure(index, np.flatnonzero(_not_dropped(index, self.spec)), index.num_trajectories)
            index.save(self._home, dataset_statistics=json.dumps(released.to_dict(), indent=1))
            self._warn(index)

    @cached_property
    def index(self) -> Index:
        """Every step but its pixels; `prepare` comes first."""
        self.prepare()
        return Index.open(self._home)

    @cached_property
    def statistics(self) -> DatasetStatistics:
        """Over all splits, before any filter but the first steps that the released transform drops."""
        self.prepare()
        return DatasetStatistics.from_json(self._home / "dataset_statistics.json")

    def measure(self, steps: NDArray[np.int32]) -> DatasetStatistics:
        """Statistics of the given steps alone; kept beside the index for the next time, where one may write."""
        index = self.index
        path = self._home / f"statistics_{hashlib.sha256(steps.tobytes()).hexdigest()[:16]}.json"
        if path.exists():
            return DatasetStatistics.from_json(path)
        measured = self._measure(index, steps, len(np.unique(index.trajectory[steps])))
        if os.access(self._home, os.W_OK):
            save_json(path, measured.to_dict())
        return measured

    def encoded(self, role: str, step: int) -> bytes | None:
        """The stored bytes of the image of `role` at `step`; None where the dataset has none.

        Raises:
            BadShardError: the file is no longer the one that was indexed.
        """
        file, offset, length = self.index.images[role][step].tolist()
        if not length:
            return None
        name = self.index.files[file]
        by_number = is_array_record(name)
        if self.shards is not None and by_number:
            with self.shards.held(name) as path:
                return self.array_records.read(path, offset, length, keep=False)
        if self.shards is not None:
            return self.shards.read(name, offset, length)
        descriptor = self._descriptor(file)
        self._check_unchanged(file, os.fstat(descriptor))  # a file written over would give bytes of anything
        if by_number:
            return self.array_records.read(self._folder / name, offset, length)
        return os.pread(descriptor, length, offset)

    def image(self, role: str, step: int, size: int, mode: ImageMode = "released") -> Pixels | None:
        """The image of `role` at `step`, uint8 [size, size, 3]; None where the dataset has none.

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
        """Whole trajectories of a split, as recorded: see `read_episodes`."""
        return read_episodes(self._folder, split)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "index"} | {"descriptors": OrderedDict()}

    @cached_property
    def _folder(self) -> Path:
        if (folder := self.folder) is None:
            raise FileNotFoundError(self.missing())
        return folder

    @cached_property
    def _home(self) -> Path:
        folder = self._folder
        known = (index_module.VERSION, self.spec.fingerprint, self.bad_trajectories, self.check_images)
        key = hashlib.sha256(repr((*known, sorted(self._stamps.items()))).encode()).hexdigest()
        return index_module.cache_folder(folder, self.name) / key[:16]

    @cached_property
    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Name of each file -> its bytes and when it was last written, as found at the start; stores say only bytes."""
        if self.shards is not None:
            return {name: (size, 0) for name, size in self.shards.sizes.items()}
        stats = {path.name: path.stat() for path in self._folder.iterdir() if path.is_file()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _check_unchanged(self, file: int, now: os.stat_result) -> None:
        name = self.index.files[file]
        if self._stamps[name] != (now.st_size, now.st_mtime_ns):
            raise BadShardError(
                f"{self._folder / name} was written to after it was indexed: start again, so that it is indexed anew"
            )

    def _descriptor(self, file: int) -> int:
        if file in self.descriptors:
            self.descriptors.move_to_end(file)
            return self.descriptors[file]
        if len(self.descriptors) >= OPEN_FILES:
            os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors[file] = os.open(self._folder / self.index.files[file], os.O_RDONLY)
        return self.descriptors[file]

    def _build(self) -> Index:
        import tensorflow_datasets as tfds

        logging.getLogger("absl").setLevel(logging.WARNING)  # or tfds reports every folder it opens
        info = tfds.builder_from_directory(str(self._folder)).info
        if (found := info.file_format.value) not in READABLE:
            raise BadShardError(f"{self._folder}: file format {found} is not read, only {' and '.join(READABLE)}")
        splits = list(info.splits)
        features = json.dumps(info.features.to_json())
        jobs = [
            Job(Path(path), split, length, features, self.spec, self.bad_trajectories, self.check_images)
            for split in splits
            for path, length in zip(info.splits[split].filepaths, info.splits[split].shard_lengths, strict=True)
        ]
        if absent := [job.path.name for job in jobs if job.path.name not in self._stamps]:
            raise BadShardError(
                f"{self._folder}: dataset_info.json names files that are not there: {', '.join(absent)}"
            )
        shards = self._run(jobs)
        if not any(shard.lengths for shard in shards):
            raise BadShardError(f"{self._folder}: no trajectory can be read{self._first(shards)}")
        sizes = {job.path.name: self._stamps[job.path.name][0] for job in jobs}
        return join(shards, sizes, splits, list(self.spec.cameras))

    @staticmethod
    def _first(shards: list[Shard]) -> str:
        reasons = [
            f"; of {one['file']}, trajectory {one['trajectory']}: {one['reason']}" for s in shards for one in s.skipped
        ]
        return reasons[0] if reasons else ""

    def _warn(self, index: Index) -> None:
        if index.skipped:
            few = "".join(
                f"\n    {one['file']}, trajectory {one['trajectory']}: {one['reason']}" for one in index.skipped[:3]
            )
            log.warning(
                f"{self.name}: {len(index.skipped):,} trajectories cannot be read and are left out; "
                f"all of them are listed in {self._home / 'index.json'} under `skipped`. The first:{few}"
            )

    def _run(self, jobs: list[Job]) -> list[Shard]:
        label, large = f"indexing {self.name}", sum(self._stamps[job.path.name][0] for job in jobs) > PARALLEL_FROM
        read = partial(_read, self.shards)
        workers = min(self.workers if self.workers is not None else (os.cpu_count() or 1) * large, len(jobs))
        if workers < 2:
            return [read(job) for job in track(jobs, label, transient=True, disable=not large)]
        with worker_pool(workers) as pool:
            return list(track(pool.map(read, jobs), label, total=len(jobs), transient=True))

    def _measure(self, index: Index, steps: NDArray[Any], trajectories: int) -> DatasetStatistics:
        if not len(steps):
            raise BadShardError(f"{self._folder} holds no step after standardisation")
        return DatasetStatistics.from_array(
            index.action[steps],
            index.proprio[steps] if index.proprio.shape[1] else None,
            mask=self.spec.action_mask(index.action.shape[1]),
            num_trajectories=trajectories,
        )


def _read(shards: Shards | None, job: Job) -> Shard:
    if shards is None:
        return read_shard(job)
    with shards.held(job.path.name) as path:
        return read_shard(replace(job, path=path))


def _not_dropped(index: Index, spec: DatasetSpec) -> NDArray[np.bool_]:
    kept = np.ones(index.num_steps, bool)
    if spec.drop_first:
        kept[index.bounds[:-1][np.diff(index.bounds) > 0]] = False
    return kept
