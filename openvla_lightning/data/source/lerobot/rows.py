"""The rows of a dataset's parquet files, episode by episode, and the pictures in them."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import problem_of
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.lerobot.metadata import ROW_COLUMNS, EpisodeEntry, Feature, Metadata
from openvla_lightning.runtime.files import pointer, written_whole

PICTURES_AT_ONCE = 64
TIME_TOLERANCE = 1e-4
"""Allowed difference in seconds between a row's time and the frame grid, as in the lerobot library."""


@dataclass(frozen=True)
class DataJob:
    """One parquet file to read.

    Attributes:
        path: the file below the dataset.
        features: columns to read besides the five that identify a row.
        pictures: columns with encoded pictures.
        records: the file to which the pictures' bytes are copied; one for each parquet file.
        check_images: decode every picture instead of checking only its first and last bytes.
    """

    path: str
    features: Mapping[str, Feature]
    pictures: tuple[str, ...] = ()
    records: Path | None = None
    check_images: bool = False


@dataclass
class Rows:
    """All rows of one episode.

    Attributes:
        file: the parquet file they are in.
        columns: name -> values [T, ...]; pictures are int64 [T, 2], offset and length in the file's records.
        problem: the first picture that cannot be used, and why; None if all can.
    """

    number: int
    file: str
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    problem: str | None = None


def read_rows(job: DataJob, path: Path) -> tuple[list[Rows], str | None]:
    """Read the parquet file at `path`; the second value is the reason if that is impossible."""
    import pyarrow
    import pyarrow.parquet

    if not path.exists():
        return [], "the file is missing"
    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        wanted = [*ROW_COLUMNS, *job.features]
        if absent := [name for name in [*wanted, *job.pictures] if name not in there]:
            return [], f"it has no column {', '.join(absent)}"
        table = file.read(wanted)
        columns = {name: values(table.column(name), job.features.get(name), name) for name in wanted}
        problems: dict[int, tuple[str, str]] = {}
        if job.pictures:
            places = _copy_pictures(file, job)
            columns |= places
            problems = _problems(job, places)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return [], f"it cannot be read: {pointer(path) or ' '.join(str(error).split())}"
    numbers = columns["episode_index"]
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)] if len(numbers) else [0]
    found = []
    for first, last in pairwise(edges):
        part = {name: column[first:last] for name, column in columns.items()}
        bad = ((row - first, *problems[row]) for row in range(first, last) if row in problems)
        problem = next((f"{name} of frame {frame} {reason}" for frame, name, reason in bad), None)
        found.append(Rows(int(numbers[first]), job.path, part, problem))
    return found, None


def values(column: Any, feature: Feature | None, name: str) -> NDArray[Any]:
    """A parquet column as an array [T, ...] in the shape of `info.json`.

    Raises:
        ValueError: values are missing, or lists differ in length from each other or from `info.json`.
    """
    import pyarrow

    array = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    if isinstance(array, pyarrow.ChunkedArray):
        array = pyarrow.concat_arrays(array.chunks)
    steps = len(array)
    while pyarrow.types.is_list(array.type) or _is_fixed(array.type) or pyarrow.types.is_large_list(array.type):
        if array.null_count:
            raise ValueError(f"{name} is empty in {array.null_count} rows")
        if not _is_fixed(array.type):
            lengths = np.unique(np.diff(array.offsets.to_numpy()))
            if len(lengths) > 1:
                raise ValueError(f"{name} has {lengths[0]} numbers in some rows and {lengths[-1]} in others")
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"{name} is empty in {array.null_count} rows")
    numbers = array.to_numpy(zero_copy_only=False)
    if feature is None:
        return numbers
    if len(numbers) != steps * feature.width:
        found = len(numbers) // max(1, steps)
        raise ValueError(f"{name} has {found} numbers a row, info.json says {feature.width}")
    return numbers.reshape(steps, feature.width) if numbers.dtype != object else numbers


def _is_fixed(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_fixed_size_list(kind)


def check_rows(rows: Rows, episode: EpisodeEntry, metadata: Metadata) -> None:
    """Raise ValueError for an episode whose rows contradict `meta/`; the message has the first wrong row."""
    columns, found = rows.columns, len(rows.columns["index"])
    if found != episode.length:
        raise ValueError(f"{rows.file} holds {found} rows of it, meta/ says {episode.length}")
    frames = columns["frame_index"]
    if (wrong := np.flatnonzero(frames != np.arange(found))).size:
        raise ValueError(f"frame_index of row {wrong[0]} is {frames[wrong[0]]}")
    start = episode.first if episode.first is not None else int(columns["index"][0])
    if (wrong := np.flatnonzero(columns["index"] != start + np.arange(found))).size:
        raise ValueError(f"index of frame {wrong[0]} is {columns['index'][wrong[0]]}, expected {start + wrong[0]}")
    times = columns["timestamp"].astype(np.float64)
    off = np.abs(times - frames / metadata.fps)
    allowed = TIME_TOLERANCE + np.spacing(columns["timestamp"].astype(np.float32))
    if (wrong := np.flatnonzero(~(off <= allowed))).size:
        frame = wrong[0]
        raise ValueError(
            f"timestamp of frame {frame} is {times[frame]:.4f} s; at {metadata.fps:g} frames a second it should be "
            f"{frame / metadata.fps:.4f} s"
        )
    unknown = sorted(set(columns["task_index"].tolist()) - metadata.tasks.keys())
    if unknown:
        raise ValueError(f"task_index {unknown[0]} is not among the {len(metadata.tasks)} tasks of meta/")
    if rows.problem is not None:
        raise ValueError(rows.problem)


def check_finite(trajectory: Mapping[str, NDArray[Any]], names: list[str]) -> None:
    """Raise ValueError if a used value is not finite; the message has frame and dimension."""
    for name in names:
        column = trajectory[name]
        if column.dtype.kind == "f" and (wrong := np.argwhere(~np.isfinite(column))).size:
            frame, *place = wrong[0].tolist()
            raise ValueError(
                f"{name} of frame {frame}, dimension {place[0] if place else 0}, is {column[tuple(wrong[0])]}"
            )


def _copy_pictures(file: Any, job: DataJob) -> dict[str, NDArray[np.int64]]:
    """Copy encoded pictures out of compressed parquet into a file from which one read returns each of them."""
    if job.records is None:
        raise ValueError(f"nowhere to copy {', '.join(job.pictures)} to")
    kept = job.records.with_suffix(".npz")
    if job.records.exists() and kept.exists():  # from an earlier, interrupted pass
        with np.load(kept) as places:
            return {name: places[name] for name in job.pictures}
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in job.pictures}
    with written_whole(job.records) as beside:  # another process may copy the same for another description
        with beside.open("wb") as records:
            for name, picture in _pictures(file, job.pictures):
                found[name].append((records.tell(), records.write(picture)))
        arrays = {name: np.array(places, np.int64).reshape(-1, 2) for name, places in found.items()}
        with written_whole(kept) as places_beside, places_beside.open("wb") as places_file:
            np.savez(places_file, **arrays)  # type: ignore[arg-type]
    return arrays


def _pictures(file: Any, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    for batch in file.iter_batches(PICTURES_AT_ONCE, columns=list(names)):
        for name in names:
            for picture in batch.column(name).to_pylist():
                yield name, (picture.get("bytes") if isinstance(picture, dict) else picture) or b""


def _problems(job: DataJob, places: Mapping[str, NDArray[np.int64]]) -> dict[int, tuple[str, str]]:
    """Row -> the first of its copied pictures that cannot be used, and what is wrong with it."""
    found: dict[int, tuple[str, str]] = {}
    assert job.records is not None
    with job.records.open("rb") as records:
        for name, spans in places.items():
            for row, (offset, length) in enumerate(spans.tolist()):
                encoded = os.pread(records.fileno(), length, offset)
                problem = problem_of(encoded, job.check_images) if length else "holds no picture, at most a path to one"
                if problem is not None:
                    found.setdefault(row, (name, problem))
    return found


def check_space(name: str, records: Sequence[Path], compressed: int) -> None:
    """Raise BadShardError if the disk has no room to copy `compressed` bytes of pictures from parquet to `records`."""
    home = next(parent for parent in records[0].parents if parent.exists())
    there = sum(path.stat().st_size for path in records if path.exists())
    if (needed := compressed - there) > (free := shutil.disk_usage(home).free):
        raise BadShardError(
            f"{name}: its pictures lie compressed in parquet files and are copied once, which takes "
            f"{needed / 1e9:.1f} GB in {home}; {free / 1e9:.1f} GB are free"
        )
