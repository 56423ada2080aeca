"""The metadata of a LeRobot folder: `meta/` of the layouts v2.0, v2.1 and v3.0, in one form."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.lerobot.meta_files import read_json, read_json_lines, read_table

VERSIONS = ("v2.0", "v2.1", "v3.0")
PICTURES = ("video", "image")
ROW_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
INFO = "meta/info.json"
V1 = (
    "LeRobot v1.x is not read. Convert it with LeRobot's own scripts: `convert_dataset_v1_to_v2`, then "
    "`convert_dataset_v20_to_v21` (lerobot 0.3.3, folder lerobot/datasets)"
)


@dataclass(frozen=True)
class Feature:
    """One column of a dataset, as `info.json` describes it.

    Attributes:
        dtype: `video`, `image`, `float32`, `int64`, `bool`, `string`, ...
        shape: shape of one step's value.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_picture(self) -> bool:
        """Whether it holds a camera's pictures."""
        return self.dtype in PICTURES

    @property
    def width(self) -> int:
        """Number of values per step."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Clip:
    """The video frames of one episode and camera: `path` below the dataset, starting at `start` seconds."""

    path: str
    start: float = 0.0


@dataclass(frozen=True)
class EpisodeEntry:
    """One trajectory, as `meta/` describes it.

    Attributes:
        number: `episode_index`.
        length: number of steps.
        first: `index` of its first step, if it is stored (v3.0).
        data: the parquet file that should hold it. It is used in messages only, because v3.0 converters write wrong
            ones.
        clips: video feature -> its frames.
    """

    number: int
    length: int
    first: int | None
    data: str
    clips: Mapping[str, Clip]


@dataclass(frozen=True)
class Metadata:
    """Everything under `meta/`.

    Attributes:
        folder: of the dataset.
        info: `meta/info.json`.
        episodes: in the order of their numbers.
        tasks: `task_index` -> instruction.
        modality: GR00T's `meta/modality.json`, which names slices of the vectors; empty without one.
    """

    folder: Path
    info: Mapping[str, Any]
    episodes: tuple[EpisodeEntry, ...] = ()
    tasks: Mapping[int, str] = field(default_factory=dict)
    modality: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def features(self) -> dict[str, Feature]:
        """Every column."""
        found = {}
        for name, entry in self.info["features"].items():
            found[name] = Feature(str(entry["dtype"]), tuple(int(n) for n in entry.get("shape") or ()))
        return found

    @property
    def version(self) -> str:
        """One of `VERSIONS`."""
        return str(self.info["codebase_version"])

    @property
    def fps(self) -> float:
        """Steps per second."""
        return float(self.info["fps"])

    def splits(self) -> tuple[tuple[str, ...], dict[int, str]]:
        """Names of the splits, and the split of each episode.

        If the ranges do not contain every episode once, as after merging or deleting, they are ignored: all
        episodes are then `train`, as in the lerobot library.
        """
        numbers = [episode.number for episode in self.episodes]
        found: dict[int, str] = {}
        listed = 0
        given = self.info.get("splits")
        for name, text in given.items() if isinstance(given, Mapping) else ():
            first, _, last = str(text).partition(":")
            if not (first.isdigit() and last.isdigit()):
                return ("train",), dict.fromkeys(numbers, "train")
            listed += int(last) - int(first)
            found |= dict.fromkeys(range(int(first), int(last)), str(name))
        if listed != len(found) or found.keys() != set(numbers):
            return ("train",), dict.fromkeys(numbers, "train")
        return tuple(dict.fromkeys(found.values())), found

    def data_files(self, there: Iterable[str]) -> list[str]:
        """Every parquet file with rows, in their order; `there` are the names of the files that exist.

        Only files that are called as `info.json` says: a copy beside one, or what an archive of macOS brings, is none.
        """
        if self.version != "v3.0":
            return sorted({episode.data for episode in self.episodes})
        # what episodes say of their data file is not always right
        called = re.sub(r"\\\{.*?\\\}", "[0-9]+", re.escape(self.info["data_path"]))
        return _called(called, (name for name in there if name.startswith("data/") and name.endswith(".parquet")))


def _called(pattern: str, names: Iterable[str]) -> list[str]:
    """Those names that fit, sorted; where none does, all that are not hidden."""
    seen = sorted(name for name in names if not name.rpartition("/")[2].startswith("."))
    return [name for name in seen if re.fullmatch(pattern, name)] or seen


def read_info(folder: Path) -> Metadata:
    """Read only `info.json` and `modality.json`, which takes milliseconds and is enough for a check.

    Raises:
        BadShardError: there is no such dataset, its version is not supported, or the file is no JSON.
    """
    path = folder / INFO
    if not path.exists():
        if (folder / "meta_data").is_dir():
            raise BadShardError(f"{folder}: {V1}")
        raise BadShardError(f"{folder} holds no {INFO}, so it is no LeRobot dataset")
    info = read_json(path)
    if not isinstance(info, dict):
        raise BadShardError(f"{path} holds no JSON object")
    version = info.get("codebase_version")
    if isinstance(version, str) and version.startswith("v1."):
        raise BadShardError(f"{path}: {V1}")
    if version not in VERSIONS:
        raise BadShardError(f"{path}: codebase_version {version!r} is not read, only {', '.join(VERSIONS)}")
    if absent := [key for key in ("fps", "features", "data_path") if not info.get(key)]:
        raise BadShardError(f"{path} lacks {', '.join(absent)}")
    if not isinstance(info["fps"], int | float) or not info["fps"] > 0:
        raise BadShardError(f"{path}: fps is {info['fps']!r}, not a number above 0")
    described = info["features"].items() if isinstance(info["features"], dict) else [("", None)]
    if vague := [name for name, entry in described if not isinstance(entry, dict) or "dtype" not in entry]:
        raise BadShardError(f"{path}: features.{vague[0]} does not say its dtype")
    modality = folder / "meta" / "modality.json"
    return Metadata(folder, info, modality=read_json(modality) if modality.exists() else {})


def read_metadata(folder: Path) -> Metadata:
    """Read everything under `meta/`.

    Raises:
        BadShardError: a file is missing or damaged, or the version is not supported.
    """
    bare = read_info(folder)
    read = _episodes_v3 if bare.version == "v3.0" else _episodes_v2
    try:
        episodes = sorted(read(bare), key=lambda episode: episode.number)
        return Metadata(folder, bare.info, tuple(episodes), _tasks(bare), bare.modality)
    except KeyError as error:
        raise BadShardError(f"{folder}/meta lacks {error.args[0]!r}") from None


def stored_statistics(metadata: Metadata) -> dict[str, dict[str, np.ndarray]]:
    """The statistics that the dataset stores: feature -> `min max mean std q01 q99` -> float64 [D]; empty if none.

    v2.1 has them per episode only; they are pooled as in the lerobot library.
    """
    folder = metadata.folder / "meta"
    numeric = {name for name, feature in metadata.features.items() if not feature.is_picture}
    if (path := folder / "stats.json").exists():
        stored = [read_json(path)]
    elif (path := folder / "episodes_stats.jsonl").exists():
        stored = [line["stats"] for line in read_json_lines(path)]
    else:
        return {}
    found = {}
    for name in sorted(numeric.intersection(*stored)):
        parts = [{key: np.asarray(value, np.float64).ravel() for key, value in one[name].items()} for one in stored]
        if all({"min", "max", "mean", "std"} <= part.keys() for part in parts):
            found[name] = parts[0] if len(parts) == 1 else _pooled(parts)
    return found


def _pooled(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    counts = np.stack([part["count"] for part in parts])
    share = counts / counts.sum(axis=0)
    means = np.stack([part["mean"] for part in parts])
    mean = (share * means).sum(axis=0)
    variance = (share * (np.stack([part["std"] for part in parts]) ** 2 + (means - mean) ** 2)).sum(axis=0)
    lowest, highest = (np.stack([part[key] for part in parts]) for key in ("min", "max"))
    return {"min": lowest.min(axis=0), "max": highest.max(axis=0), "mean": mean, "std": np.sqrt(variance)}


def _episodes_v2(bare: Metadata) -> Iterator[EpisodeEntry]:
    info, chunk = bare.info, int(bare.info.get("chunks_size") or 1000)
    videos = [name for name, feature in bare.features.items() if feature.dtype == "video"]
    for line in read_json_lines(bare.folder / "meta" / "episodes.jsonl"):
        number = int(line["episode_index"])
        place = {"episode_chunk": number // chunk, "episode_index": number}
        clips = {key: Clip(info["video_path"].format(video_key=key, **place)) for key in videos}
        yield EpisodeEntry(number, int(line["length"]), None, info["data_path"].format(**place), clips)


def _episodes_v3(bare: Metadata) -> Iterator[EpisodeEntry]:
    videos = [name for name, feature in bare.features.items() if feature.dtype == "video"]
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{what}" for key in videos for what in ("chunk_index", "file_index", "from_timestamp")]
    home = bare.folder / "meta" / "episodes"
    files = _called(r"chunk-\d+/file-\d+\.parquet", (p.relative_to(home).as_posix() for p in home.glob("**/*.parquet")))
    if not files:
        raise BadShardError(f"{home} holds no parquet file")
    for name in files:
        for row in read_table(home / name, columns).to_pylist():
            clips = {}
            for key in videos:
                chunk, file, start = (
                    row[f"videos/{key}/{what}"] for what in ("chunk_index", "file_index", "from_timestamp")
                )
                name = bare.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
                clips[key] = Clip(name, float(start))
            data = bare.info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            yield EpisodeEntry(
                int(row["episode_index"]), int(row["length"]), int(row["dataset_from_index"]), data, clips
            )


def _tasks(bare: Metadata) -> dict[int, str]:
    if bare.version != "v3.0":
        lines = read_json_lines(bare.folder / "meta" / "tasks.jsonl")
        return {int(line["task_index"]): str(line["task"]) for line in lines}
    path = bare.folder / "meta" / "tasks.parquet"
    table = read_table(path)
    words = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not words:
        raise BadShardError(f"{path} has no column `task`, only {', '.join(table.column_names)}")
    numbers, texts = table.column("task_index").to_pylist(), table.column(words[0]).to_pylist()
    return dict(zip(numbers, texts, strict=True))
