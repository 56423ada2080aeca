"""The pass over all files of a LeRobot dataset; those in a store are fetched one by one."""

import base64
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.faults import BadShardError, BadTrajectories
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.kept import Form, name_of
from openvla_lightning.data.source.lerobot.description import camera_features
from openvla_lightning.data.source.lerobot.indexing import (
    PACKED,
    Assembly,
    picture_features,
    picture_files,
    records_of,
)
from openvla_lightning.data.source.lerobot.kept import PACKETS, ROWS, together
from openvla_lightning.data.source.lerobot.metadata import ROW_COLUMNS, Metadata, read_metadata
from openvla_lightning.data.source.lerobot.packets import Video, read_packets
from openvla_lightning.data.source.lerobot.remote import RemoteFiles, local
from openvla_lightning.data.source.lerobot.rows import DataJob, Rows, check_space, read_rows
from openvla_lightning.data.source.lerobot.stored import compare
from openvla_lightning.data.source.processes import KEPT_FROM, PARALLEL_FROM, worker_pool
from openvla_lightning.runtime.progress import track

log = logging.getLogger(__name__)

WIDEST = 4096
"""Columns with more numbers per step than this (point clouds, depth) are not read."""

Each = Callable[[Callable[[Any], Any], Sequence[Any], str, Form[Any], Any], Iterable[Any]]


@dataclass(frozen=True)
class Files:
    """A dataset's files.

    Attributes:
        name: the dataset's name.
        folder: folder with the files, or at least with `meta/`.
        sizes: name of each file below the dataset -> its bytes.
        pictures: folder to which pictures in parquet files are copied.
        stamps: name of each file -> bytes and time of the last write.
        kept: folder for the results of each file until the index is complete; None: nothing is kept.
        remote: the store of the other files; None: they are in `folder`.
    """

    name: str
    folder: Path
    sizes: Mapping[str, int]
    pictures: Path
    stamps: Mapping[str, Any] = field(default_factory=dict)
    kept: Path | None = None
    remote: RemoteFiles | None = None


def build(
    files: Files, spec: DatasetSpec, workers: int | None, *, bad_trajectories: BadTrajectories, check_images: bool
) -> tuple[Index, Mapping[str, NDArray[Any]], Mapping[str, Any]]:
    """Read everything but pixels.

    Returns:
        The index; the array `packets` with the packet table of every video; and the facts `videos`, `episodes` (the
        number of each trajectory's episode) and `remarks` (errors in the dataset's own statistics and splits).

    Raises:
        BadShardError: something is missing or damaged; the message names file and episode.
    """
    try:
        metadata = read_metadata(files.folder)
    except BadShardError as error:
        raise BadShardError(f"{files.name}: {error}") from None
    each = partial(_each, files, workers, sum(files.sizes.values()) > PARALLEL_FROM)
    cameras = camera_features(metadata, spec)
    if not (data_files := metadata.data_files(files.sizes)):
        raise BadShardError(f"{files.name}: {files.folder / 'data'} holds no parquet file")
    numbers = picture_files(metadata, cameras, data_files)
    names = [name for name in numbers if not name.endswith(PACKED)]
    videos, packets = _read_videos(files, names, each, check_images)
    assembly = Assembly(metadata, spec, numbers, videos, bad_trajectories)
    jobs = _jobs(files, metadata, cameras, data_files, check_images)
    read = partial(_read_rows, files)
    found = each(read, jobs, f"reading {files.name}", ROWS, attrgetter("path"))
    for job, (rows, problem) in zip(jobs, found, strict=True):
        assembly.add(job.path, rows, problem)
    index = assembly.finish()
    described = [asdict(one) | {"extradata": base64.b64encode(one.extradata).decode()} for one, _ in videos.values()]
    remarks = compare(metadata, assembly.raw)
    if (ignored := metadata.ignored_splits) is not None:
        log.warning(f"{files.name}: {ignored}")
        remarks.append(ignored)
    facts = {"videos": described, "episodes": sorted(assembly.parts), "remarks": remarks}
    return index, {"packets": packets}, facts


def _each(
    files: Files,
    workers: int | None,
    large: bool,
    read: Callable[[Any], Any],
    jobs: Sequence[Any],
    label: str,
    form: Form[Any],
    name: Callable[[Any], str],
) -> Iterator[Any]:
    """Results of `read` for every job, in order. Long passes use several processes and show a progress bar.

    Such results are also stored, and results that an earlier pass stored are not read again.
    """
    home, began = files.kept, time.monotonic()
    paths = [home / name_of(job, files.stamps.get(name(job))) for job in jobs] if home else []
    known = {place: one for place, path in enumerate(paths) if (one := form.load(path)) is not None}
    missing = [job for place, job in enumerate(jobs) if place not in known]
    workers = min(workers if workers is not None else (os.cpu_count() or 1) * large, len(missing))
    with worker_pool(workers) if workers > 1 else nullcontext() as pool:
        found = together(known, pool.map(read, missing) if pool is not None else map(read, missing), len(jobs))
        for place, (new, one) in enumerate(track(found, label, len(jobs), "files", visible=large)):
            if new and paths and time.monotonic() - began > KEPT_FROM:
                form.save(paths[place], one)
            yield one


def _jobs(
    files: Files, metadata: Metadata, cameras: Mapping[str, str], data_files: list[str], check_images: bool
) -> list[DataJob]:
    columns = {
        name: feature
        for name, feature in metadata.features.items()
        if not feature.is_picture and feature.width <= WIDEST and name not in ROW_COLUMNS
    }
    if not (pictures := picture_features(metadata, cameras)):
        return [DataJob(name, columns) for name in data_files]
    records = [files.pictures / records_of(name, pictures) for name in data_files]
    check_space(files.name, records, sum(files.sizes.get(name, 0) for name in data_files))
    pairs = zip(data_files, records, strict=True)
    return [DataJob(name, columns, pictures, path, check_images) for name, path in pairs]


def _read_videos(
    files: Files, names: list[str], each: Each, check_images: bool
) -> tuple[dict[str, tuple[Video, NDArray[np.int64]]], NDArray[np.int64]]:
    found: dict[str, tuple[Video, NDArray[np.int64]]] = {}
    first = 0
    read = partial(_read_packets, files, check_images)
    for video, packets in each(read, names, f"looking through the videos of {files.name}", PACKETS, str):
        found[video.path] = replace(video, first=first, last=first + len(packets)), packets
        first += len(packets)
    tables = [packets for _, packets in found.values()]
    return found, np.concatenate(tables) if tables else np.zeros((0, 4), np.int64)


def _read_rows(files: Files, job: DataJob) -> tuple[list[Rows], str | None]:
    with local(files.remote, files.folder, job.path) as path:
        return read_rows(job, path)


def _read_packets(files: Files, every_frame: bool, name: str) -> tuple[Video, NDArray[np.int64]]:
    with local(files.remote, files.folder, name) as path:
        return read_packets(path, name, every_frame)
