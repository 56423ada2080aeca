"""RLDS folders (tensorflow_datasets) without TensorFlow: indexed once, then read frame by frame.

The index holds everything but pixels, and for each image its file, offset and length, so that any step of a dataset is
one `pread` away: exact shuffles without a buffer, exact resumption, and statistics without touching images again.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from openvla_lightning.data.images import ImageMode, Pixels, load
from openvla_lightning.data.oxe.registry import DatasetSpec, Trajectory, dataset_spec, leaf_at
from openvla_lightning.data.source import index as index_module
from openvla_lightning.data.source.index import Index, save_json
from openvla_lightning.data.source.processes import worker_pool
from openvla_lightning.data.source.records import BadShardError, read
from openvla_lightning.statistics import DatasetStatistics

OPEN_FILES = 256
PARALLEL_FROM = 256 * 2**20


class RLDS:
    """One RLDS dataset below `root`: `<root>/<name>/<version>/{dataset_info.json,features.json,*.tfrecord-*}`.

    Args:
        root: the data directory.
        name: the dataset's name; its folder.
        spec: what to make of it; None: what is registered under `name`.
        workers: processes that index; None: one per core for large datasets, none for small ones.
    """

    def __init__(
        self, root: str | Path, name: str, spec: DatasetSpec | None = None, workers: int | None = None
    ) -> None:
        self.root, self.name, self.given, self.workers = Path(root), name, spec, workers
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    @cached_property
    def spec(self) -> DatasetSpec:
        """What is known of the dataset."""
        return self.given or dataset_spec(self.name)

    def missing(self) -> str | None:
        """Say where the dataset was looked for and how to get it; None when it is there. Takes milliseconds."""
        if self.folder is not None:
            return None
        hint = self.spec.where.format(name=self.name, root=self.root) or "put its RLDS folder there"
        return f"{self.name}: no {self.root / self.name}/<version>/dataset_info.json. Get it: {hint}"

    @property
    def folder(self) -> Path | None:
        """The newest version's folder, or None."""
        found = [path.parent for path in (self.root / self.name).glob("*/dataset_info.json")]
        if (self.root / self.name / "dataset_info.json").exists():
            found.append(self.root / self.name)
        return max(found, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")], default=None)

    def prepare(self) -> None:
        """Index the dataset unless that was done: one pass over its files.

        Raises:
            FileNotFoundError: the dataset is not there.
            BadShardError: a file is damaged, an action is not finite, a key is missing; with file and trajectory.
        """
        if not (self._home / "index.json").exists():
            index = self._build()
            released = self._measure(index, np.flatnonzero(_not_dropped(index, self.spec)), index.num_trajectories)
            index.save(self._home, dataset_statistics=json.dumps(released.to_dict(), indent=1))

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
        """Statistics of the given steps alone; kept beside the index for the next time."""
        index = self.index
        path = self._home / f"statistics_{hashlib.sha256(steps.tobytes()).hexdigest()[:16]}.json"
        if not path.exists():
            save_json(path, self._measure(index, steps, len(np.unique(index.trajectory[steps]))).to_dict())
        return DatasetStatistics.from_json(path)

    def encoded(self, role: str, step: int) -> bytes | None:
        """The stored bytes of the image of `role` at `step`; None where the dataset has none."""
        file, offset, length = self.index.images[role][step].tolist()
        return os.pread(self._descriptor(file), length, offset) if length else None

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

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "index"} | {"descriptors": OrderedDict()}

    @property
    def _folder(self) -> Path:
        if (folder := self.folder) is None:
            raise FileNotFoundError(self.missing())
        return folder

    @cached_property
    def _home(self) -> Path:
        folder = self._folder
        files = sorted(path for path in folder.iterdir() if path.is_file())
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        key = hashlib.sha256(repr((index_module.VERSION, self.spec.fingerprint, stamps)).encode()).hexdigest()
        return index_module.cache_folder(folder, self.name) / key[:16]

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
        if info.file_format.value != "tfrecord":
            raise BadShardError(f"{self._folder}: file format {info.file_format.value} is not read yet, only tfrecord")
        splits = list(info.splits)
        features = json.dumps(info.features.to_json())
        jobs, expected = [], []
        for split in splits:
            paths = [Path(path) for path in info.splits[split].filepaths]
            jobs += [(path, split, features, self.spec) for path in paths]
            expected += info.splits[split].shard_lengths
        if absent := [path.name for path, *_ in jobs if not path.exists()]:
            raise BadShardError(
                f"{self._folder}: dataset_info.json names files that are not there: {', '.join(absent)}"
            )
        shards = self._run(jobs)
        for (path, *_), shard, length in zip(jobs, shards, expected, strict=True):
            if len(shard.lengths) != length:
                raise BadShardError(
                    f"{path} holds {len(shard.lengths)} trajectories, dataset_info.json says {length}: get it again"
                )
        return _join(shards, [path for path, *_ in jobs], splits, list(self.spec.cameras))

    def _run(self, jobs: list[Any]) -> list["_Shard"]:
        label, large = f"indexing {self.name}", sum(path.stat().st_size for path, *_ in jobs) > PARALLEL_FROM
        workers = min(self.workers if self.workers is not None else (os.cpu_count() or 1) * large, len(jobs))
        if workers < 2:
            return [_read_shard(job) for job in track(jobs, label, transient=True, disable=not large)]
        with worker_pool(workers) as pool:
            return list(track(pool.map(_read_shard, jobs), label, total=len(jobs), transient=True))

    def _measure(self, index: Index, steps: NDArray[Any], trajectories: int) -> DatasetStatistics:
        if not len(steps):
            raise BadShardError(f"{self._folder} holds no step after standardisation")
        return DatasetStatistics.from_array(
            index.action[steps],
            index.proprio[steps] if index.proprio.shape[1] else None,
            mask=self.spec.action_mask(index.action.shape[1]),
            num_trajectories=trajectories,
        )


@dataclass
class _Shard:
    split: str
    lengths: list[int]
    action: list[NDArray[np.float32]]
    proprio: list[NDArray[np.float32]]
    instruction: list[NDArray[Any]]
    images: dict[str, list[NDArray[np.int64]]]


def _read_shard(job: tuple[Path, str, str, DatasetSpec]) -> _Shard:
    import tensorflow_datasets as tfds

    path, split, features_json, spec = job
    features = tfds.features.FeatureConnector.from_json(json.loads(features_json))
    skip = {"steps": tfds.decode.SkipDecoding()}
    shard = _Shard(split, [], [], [], [], {role: [] for role in spec.cameras})
    for number, (start, record) in enumerate(read(path)):
        try:
            raw = features.deserialize_example_np(record, decoders=skip)["steps"]
            _add(shard, spec, raw, record, start)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            reason = error.args[0] if error.args else error
            raise BadShardError(f"{spec.name}: {path}, trajectory {number}: {reason}") from error
    return shard


def _add(shard: _Shard, spec: DatasetSpec, raw: Trajectory, record: bytes, start: int) -> None:
    seen = dict(leaf_at(raw, "observation"))
    for camera in filter(None, spec.cameras.values()):
        seen[camera] = _places(leaf_at(raw, f"observation/{camera}"), record, start)
    trajectory = spec.transform(raw | {"observation": seen})
    action = np.asarray(leaf_at(trajectory, "action"), np.float32)
    if action.ndim != 2 or not np.isfinite(action).all():
        raise ValueError(f"an action is not a finite vector (shape {list(action.shape)})")
    spec.check_width(action.shape[1])
    steps = len(action)
    shard.lengths.append(steps)
    shard.action.append(action)
    shard.instruction.append(np.broadcast_to(np.asarray(leaf_at(trajectory, spec.language), object), (steps,)))
    columns = [_state(trajectory, key, steps) for key in spec.state]
    shard.proprio.append(np.concatenate([np.zeros((steps, 0), np.float32), *columns], axis=1))
    for role, key in spec.cameras.items():
        places = np.zeros((steps, 2), np.int64) if key is None else trajectory["observation"][key]
        shard.images[role].append(places)


def _state(trajectory: Trajectory, key: str | None, steps: int) -> NDArray[np.float32]:
    if key is None:
        return np.zeros((steps, 1), np.float32)
    return np.asarray(leaf_at(trajectory, f"observation/{key}"), np.float32).reshape(steps, -1)


def _places(images: NDArray[Any], record: bytes, start: int) -> NDArray[np.int64]:
    """Offset in the file and length of each encoded image. Wherever equal bytes are found is as good a place."""
    places = np.zeros((len(images), 2), np.int64)
    cursor = 0
    for i, image in enumerate(images):
        if image:
            found = record.find(image, cursor)
            cursor = (found if found >= 0 else record.index(image)) + len(image)
            places[i] = start + cursor - len(image), len(image)
    return places


def _join(shards: list[_Shard], files: list[Path], splits: list[str], cameras: list[str]) -> Index:
    def stacked(name: str) -> NDArray[Any]:
        return np.concatenate([part for shard in shards for part in getattr(shard, name)])

    words, instruction = np.unique(stacked("instruction").astype(bytes), return_inverse=True)
    images = {}
    for role in cameras:
        parts = [(np.full((len(part), 1), i), part) for i, shard in enumerate(shards) for part in shard.images[role]]
        images[role] = np.concatenate([np.concatenate(pair, axis=1) for pair in parts])
    return Index(
        action=stacked("action"),
        proprio=stacked("proprio"),
        bounds=np.cumsum([0, *(length for shard in shards for length in shard.lengths)]),
        split=np.array([splits.index(shard.split) for shard in shards for _ in shard.lengths], np.int16),
        instruction=instruction.astype(np.int32),
        images=images,
        splits=tuple(splits),
        instructions=tuple(word.decode("utf-8", "replace") for word in words.tolist()),
        files=tuple(path.name for path in files),
        shards=np.cumsum([0, *(sum(shard.lengths) for shard in shards)]),
        sizes=np.array([path.stat().st_size for path in files], np.int64),
    )


def _not_dropped(index: Index, spec: DatasetSpec) -> NDArray[np.bool_]:
    kept = np.ones(index.num_steps, bool)
    if spec.drop_first:
        kept[index.bounds[:-1][np.diff(index.bounds) > 0]] = False
    return kept
