"""The pass over all files of a dataset: in several processes, one pass at a time; interrupted passes are resumed."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.faults import BadShardError, BadTrajectories, first_of
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.kept import Form, name_of
from openvla_lightning.data.source.processes import KEPT_FROM, PARALLEL_FROM, worker_pool
from openvla_lightning.data.source.rlds.arrays import Layout
from openvla_lightning.data.source.rlds.description import AGAIN, METADATA, read_features, read_splits
from openvla_lightning.data.source.rlds.indexing import Job, Shard, image_layouts, join, make_alike, read_shard
from openvla_lightning.data.source.rlds.shards import Shards
from openvla_lightning.data.source.words import numbered
from openvla_lightning.runtime.progress import Bar

log = logging.getLogger(__name__)


LISTED = 3
READABLE = ("tfrecord", "array_record")

Stamp = tuple[int, int]


def build_index(
    folder: Path,
    spec: DatasetSpec,
    stamps: dict[str, Stamp],
    kept: Path,
    workers: int | None = None,
    remote: Shards | None = None,
    *,
    bad_trajectories: BadTrajectories = "error",
    check_images: bool = False,
) -> tuple[Index, dict[str, Layout]]:
    """Return the index of the dataset in `folder` and its images' layouts; for the arguments see `RLDS` and `Pass`.

    Raises:
        BadShardError: its format is not supported, a file is missing or damaged, or no trajectory is left.
    """
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.WARNING)  # otherwise tfds logs every folder that it opens
    read_features(folder)  # its error is one sentence instead of tfds's traceback
    try:
        info = tfds.builder_from_directory(str(folder)).info
    except Exception as error:  # tfds raises a different error for every fault
        problem = f"{type(error).__name__}: {error}"
        raise BadShardError(
            f"{spec.name}: {' and '.join(METADATA)} in {folder} do not describe a dataset as tfds does ({problem}). "
            f"{AGAIN}"
        ) from error
    if (found := info.file_format.value) not in READABLE:
        raise BadShardError(f"{folder}: file format {found} is not read, only {' and '.join(READABLE)}")
    splits = read_splits(folder)
    features = json.dumps(info.features.to_json(), sort_keys=True)  # protocol buffers' maps have no order
    jobs = [
        Job(folder / name, split.name, length, features, spec, bad_trajectories, check_images)
        for split in splits
        for name, length in zip(split.files, split.lengths, strict=True)
    ]
    if absent := [job.path.name for job in jobs if job.path.name not in stamps]:
        listed = ", ".join(absent[:LISTED]) + ", ..." * (len(absent) > LISTED)
        raise BadShardError(
            f"{folder}: {len(absent)} of the {len(jobs)} files that dataset_info.json names are not there: {listed}. "
            "Get them, too: the download was not complete"
        )
    shards = Pass(spec.name, jobs, stamps, kept, workers, remote).run()
    make_alike(shards, jobs)
    if not any(shard.lengths for shard in shards):
        skipped = tuple(one for shard in shards for one in shard.skipped)
        raise BadShardError(f"{folder}: no trajectory can be read{first_of(skipped)}")
    sizes = {job.path.name: stamps[job.path.name][0] for job in jobs}
    index = join(shards, sizes, [split.name for split in splits], list(spec.cameras))
    return index, image_layouts(spec, features)


class Pass:
    """Reads every file of a dataset.

    Args:
        name: the dataset's name.
        jobs: the files.
        stamps: bytes and time of the last write of each file, by its name.
        kept: folder for the results of each file until the index is complete.
        workers: processes; None: one per core for large datasets, none for small ones.
        remote: the store to fetch the files from.
    """

    def __init__(
        self,
        name: str,
        jobs: Sequence[Job],
        stamps: dict[str, Stamp],
        kept: Path,
        workers: int | None = None,
        remote: Shards | None = None,
    ) -> None:
        self.name, self.jobs, self.stamps, self.kept, self.remote = name, jobs, stamps, kept, remote
        self.bytes = sum(stamps[job.path.name][0] for job in jobs)
        wanted = workers if workers is not None else (os.cpu_count() or 1) * (self.bytes > PARALLEL_FROM)
        self.workers = min(wanted, len(jobs))

    def run(self) -> list[Shard]:
        """Read all files; return their contents in the order of the jobs.

        Raises:
            BadShardError: as `read_shard`. The results of the other files are stored for the next pass.
        """
        found: dict[int, Shard] = {}
        for place, job in enumerate(self.jobs):
            if (shard := SHARDS.load(self._file(job))) is not None:
                found[place] = shard
        if found:
            log.info(
                f"{self.name}: going on with the indexing of {len(self.jobs) - len(found)} of {len(self.jobs)} files"
            )
        began, unkept = time.monotonic(), list[int]()
        large = self.bytes > PARALLEL_FROM
        with Bar(f"indexing {self.name}", len(self.jobs), "files", done=len(found), visible=large) as progress:
            for place, shard in self._read([p for p in range(len(self.jobs)) if p not in found]):
                found[place] = shard
                progress.advance()
                unkept.append(place)
                if time.monotonic() - began > KEPT_FROM:
                    for one in unkept:
                        SHARDS.save(self._file(self.jobs[one]), found[one])
                    unkept.clear()
        return [found[place] for place in range(len(self.jobs))]

    def _read(self, places: list[int]) -> Iterator[tuple[int, Shard]]:
        read = partial(read_job, self.remote)
        if self.workers < 2:
            for place in places:
                yield place, read(self.jobs[place])
            return
        with worker_pool(self.workers) as pool:
            pending: dict[Future[Shard], int] = {pool.submit(read, self.jobs[place]): place for place in places}
            failure: BaseException | None = None
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    place = pending.pop(future)
                    if future.cancelled():
                        continue
                    if (error := future.exception()) is None:
                        yield place, future.result()
                    elif failure is None:
                        failure = error
                        for waiting in pending:
                            waiting.cancel()
            if failure is not None:
                raise failure

    def _file(self, job: Job) -> Path:
        told = (job.path.name, self.stamps[job.path.name], job.split, job.expected, job.features)
        return self.kept / name_of(*told)


def read_job(remote: Shards | None, job: Job) -> Shard:
    """Read one file; if it is in a store, fetch it first."""
    if remote is None:
        return read_shard(job)
    with remote.held(job.path.name) as path:
        return read_shard(replace(job, path=path))


def packed(shard: Shard) -> dict[str, Any]:
    """A shard as arrays without Python objects."""
    instruction, words = numbered(shard.instruction)
    text = {"split": shard.split, "skipped": shard.skipped, "words": [w.decode("latin-1") for w in words]}
    arrays = {"lengths": np.array(shard.lengths, np.int64), "instruction": instruction}
    for name in ("action", "proprio"):
        parts = [part for part in getattr(shard, name) if len(part)]
        arrays[name] = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    for role, places in shard.images.items():
        arrays[f"image_{role}"] = np.concatenate(places) if places else np.zeros((0, 2), np.int64)
    return arrays | {"text": np.frombuffer(json.dumps(text).encode(), np.uint8)}


def unpacked(arrays: dict[str, Any]) -> Shard:
    """The inverse of `packed`."""
    text = json.loads(arrays["text"].tobytes())
    lengths = arrays["lengths"].tolist()
    cuts = np.cumsum(lengths)[:-1]

    def parts(array: Any) -> list[Any]:
        return np.split(array, cuts) if lengths else []

    words = np.array([*(word.encode("latin-1") for word in text["words"]), None], object)
    return Shard(
        text["split"],
        lengths,
        parts(arrays["action"]),
        parts(arrays["proprio"]),
        parts(words[arrays["instruction"]]),
        {name.removeprefix("image_"): parts(part) for name, part in arrays.items() if name.startswith("image_")},
        text["skipped"],
    )


SHARDS: Form[Shard] = Form(packed, unpacked)
