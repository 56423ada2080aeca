"""The metadata of a LeRobot folder: `meta/` of the layouts v2.0, v2.1 and v3.0, in one form."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.lerobot.meta_files import read_json, read_json_lines, read_modality, read_table
from openvla_lightning.runtime.files import below

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
        episodes are then `train`, as in the lerobot library; see `ignored_splits`.
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

    @property
    def ignored_splits(self) -> str | None:
        """A sentence about splits that are ignored although there are several; None if there are none."""
        given = self.info.get("splits")
        if not isinstance(given, Mapping) or len(given) < 2 or len(self.splits()[0]) > 1:
            return None
        listed = ", ".join(f"{name}: {text}" for name, text in given.items())
        return (
            f"its splits ({listed}) do not hold each of its {len(self.episodes)} episodes once: all are trained on, "
            f"unless `splits` in {INFO} is corrected"
        )

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
    for name, entry in info["features"].items():
        shape = entry.get("shape") or []
        if not isinstance(shape, list) or not all(isinstance(length, int) for length in shape):
            raise BadShardError(f"{path}: the shape of features.{name} is {shape!r}, no list of numbers")
        if entry["dtype"] == "video" and not isinstance(info.get("video_path"), str):
            raise BadShardError(f"{path}: video_path is {info.get('video_path')!r}, but features.{name} is a video")
    for key in ("total_episodes", "total_frames"):
        if not isinstance(info.get(key, 0), int):
            raise BadShardError(f"{path}: {key} is {info[key]!r}, no number")
    widths = {name: feature.width for name, feature in Metadata(folder, info).features.items()}
    return Metadata(folder, info, modality=read_modality(folder / "meta" / "modality.json", widths))


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
    except BadShardError:
        raise
    except (TypeError, ValueError) as error:
        raise BadShardError(f"{folder}/meta holds no number where one of an episode or a task is: {error}") from None


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
    files = _called(r"chunk-\d+/file-\d+\.parquet", (p.relative_to(home).as_posix() for p in below(home, "*.parquet")))
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
        return _texts((line["task_index"], line["task"]) for line in lines)
    path = bare.folder / "meta" / "tasks.parquet"
    table = read_table(path)
    words = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not words:
        raise BadShardError(f"{path} has no column `task`, only {', '.join(table.column_names)}")
    numbers, texts = table.column("task_index").to_pylist(), table.column(words[0]).to_pylist()
    return _texts(zip(numbers, texts, strict=True))


def _texts(tasks: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    """Task number -> instruction; where none is given (null), it is empty."""
    found: dict[int, str] = {}
    for number, text in tasks:
        if not isinstance(text, str | None):
            raise BadShardError(f"task {number} of meta/ is {text!r}, no text")
        if found.setdefault(int(number), text or "") != (text or ""):
            raise BadShardError(f"task {number} of meta/ is both {found[int(number)]!r} and {text!r}")
    return found
