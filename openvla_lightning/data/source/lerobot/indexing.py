"""Builds the index of a LeRobot dataset from rows and packet tables, episode by episode."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.oxe.leaves import leaf_at
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.faults import WAY_OUT, BadShardError, BadTrajectories, way_out
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.lerobot.description import camera_features, slices, words
from openvla_lightning.data.source.lerobot.metadata import INFO, ROW_COLUMNS, EpisodeEntry, Metadata
from openvla_lightning.data.source.lerobot.packets import Video, match
from openvla_lightning.data.source.lerobot.rows import Rows, check_finite, check_rows
from openvla_lightning.data.source.words import instructions_of, numbered

PACKED = ".records"
"""Ending of the files with encoded pictures that were copied out of compressed parquet."""


def records_of(data_file: str, pictures: Sequence[str]) -> str:
    """Name of the file to which these camera features of a parquet file are copied; others have a file of their own."""
    key = hashlib.sha256(repr(tuple(pictures)).encode()).hexdigest()[:8]
    return f"{data_file.replace('/', '_').removesuffix('.parquet')}_{key}{PACKED}"


def picture_features(metadata: Metadata, cameras: Mapping[str, str]) -> tuple[str, ...]:
    """The features of `cameras` whose pictures lie in parquet files."""
    return tuple(dict.fromkeys(key for key in cameras.values() if metadata.features[key].dtype == "image"))


class NoPictureError(ValueError):
    """Some pictures of an episode are missing.

    Attributes:
        file: the incomplete video, below the dataset.
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(reason)
        self.file = file


@dataclass
class Assembly:
    """Joins a dataset's episodes to an index while they are read.

    Attributes:
        metadata: of the dataset.
        spec: the dataset's description.
        files: every file with pictures, in the order of the index -> its number.
        videos: for each video file, the file and its packets.
        bad_trajectories: whether an unreadable episode is an error or left out.
    """

    metadata: Metadata
    spec: DatasetSpec
    files: Mapping[str, int]
    videos: Mapping[str, tuple[Video, NDArray[np.int64]]]
    bad_trajectories: BadTrajectories = "error"
    skipped: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    raw: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cameras = camera_features(self.metadata, self.spec)
        self.pictures = picture_features(self.metadata, self.cameras)
        self.episodes = {episode.number: episode for episode in self.metadata.episodes}
        self.rows_found, self.problems = 0, dict[str, str]()
        self.seen: Counter[int] = Counter()

    def leave_out(self, file: str, trajectory: int, reason: str, advice: str = WAY_OUT) -> None:
        """Note an episode that cannot be read.

        Raises:
            BadShardError: `bad_trajectories` is `error`.
        """
        if self.bad_trajectories == "error":
            what = f"episode {trajectory}: " if trajectory >= 0 else ""
            raise BadShardError(f"{self.spec.name}: {self.metadata.folder / file}, {what}{reason}. {advice}.")
        self.skipped.append({"file": file, "trajectory": trajectory, "reason": reason})

    def add(self, file: str, found: Iterable[Rows], problem: str | None) -> None:
        """Add the contents of one parquet file."""
        if problem is not None:
            owners = [episode.number for episode in self.metadata.episodes if episode.data == file]
            self.problems[file] = problem
            if self.bad_trajectories == "error" or not owners:
                self.leave_out(file, owners[0] if owners else -1, problem)
        for rows in found:
            self.rows_found += len(rows.columns["index"])
            self.seen[rows.number] += 1
            try:
                if rows.number not in self.episodes:
                    raise ValueError("meta/ knows no such episode")
                if self.seen[rows.number] > 1:
                    raise ValueError("its rows lie in several places")
                self.parts[rows.number] = self._episode(rows, self.episodes[rows.number])
            except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
                self.parts.pop(rows.number, None)
                blamed = error.file if isinstance(error, NoPictureError) else file
                reason = str(error.args[0] if error.args else error)
                self.leave_out(blamed, rows.number, reason, way_out(error, self.spec.name))

    def finish(self) -> Index:
        """The index.

        Raises:
            BadShardError: episodes are missing, counts differ from `info.json`, or nothing can be read.
        """
        for number, episode in self.episodes.items():
            if not self.seen[number]:
                reason = self.problems.get(episode.data, "its rows are in no parquet file that is there")
                self.leave_out(episode.data, number, reason)
        self._check_counts()
        if not self.parts:
            first = "".join(f"; of episode {one['trajectory']}: {one['reason']}" for one in self.skipped[:1])
            raise BadShardError(f"{self.spec.name}: {self.metadata.folder}: no episode can be read{first}")
        parts = [self.parts[number] for number in sorted(self.parts)]
        names, split_of = self.metadata.splits()
        lengths = [len(part["action"]) for part in parts]
        instruction, texts = numbered(part["words"] for part in parts)
        images = {role: np.concatenate([part[f"image/{role}"] for part in parts]) for role in self.spec.cameras}
        shards, sizes = self._shards(images)
        return Index(
            action=np.concatenate([part["action"] for part in parts]),
            proprio=np.concatenate([part["proprio"] for part in parts]),
            bounds=np.cumsum([0, *lengths]),
            split=np.array([names.index(split_of[number]) for number in sorted(self.parts)], np.int16),
            instruction=instruction,
            images=images,
            splits=names,
            instructions=tuple(text.decode("utf-8", "replace") for text in texts),
            files=tuple(self.files),
            shards=shards,
            sizes=sizes,
            skipped=tuple(self.skipped),
        )

    def _episode(self, rows: Rows, episode: EpisodeEntry) -> dict[str, Any]:
        check_rows(rows, episode, self.metadata)
        steps, times = episode.length, rows.columns["timestamp"].astype(np.float64)
        features = set(self.cameras.values())
        raw: dict[str, Any] = {key: value for key, value in rows.columns.items() if key not in features}
        raw |= slices(self.metadata, raw) | {"language_instruction": words(self.metadata, raw["task_index"])}
        for key in features:
            is_video = self.metadata.features[key].dtype == "video"
            raw[key] = self._frames(key, episode, times) if is_video else self._pictures(rows, key)
        raw |= {key: raw[feature] for role, key in self.spec.cameras.items() if key and (feature := self.cameras[role])}
        own = {name: np.array(column) for name, column in raw.items()}  # a transform may change them in place
        trajectory = self.spec.transformed(own)
        action = np.asarray(leaf_at(trajectory, "action"), np.float32)
        if action.ndim != 2:
            raise ValueError(f"an action is no vector (shape {list(action.shape)})")
        self.spec.check_width(action.shape[1])
        states = {
            key: np.asarray(leaf_at(trajectory, key), np.float32).reshape(len(action), -1)
            for key in self.spec.state
            if key
        }
        check_finite({"action": action} | states, ["action", *states])
        zeros = np.zeros((steps, 1), np.float32)
        columns = [np.zeros((len(action), 0), np.float32)]
        columns += [zeros[: len(action)] if key is None else states[key] for key in self.spec.state]
        self._keep_raw(rows)
        places = {
            f"image/{role}": np.zeros((len(action), 3), np.int64) if key is None else np.asarray(trajectory[key])
            for role, key in self.spec.cameras.items()
        }
        for place, found in places.items():
            if len(found) != len(action):
                role = place.removeprefix("image/")
                raise ValueError(f"there are {len(action)} actions and {len(found)} pictures of {role}")
        instruction = instructions_of(trajectory, self.spec.language, len(action))
        part: dict[str, Any] = {"action": action, "proprio": np.concatenate(columns, axis=1), "words": instruction}
        number, usual = next(iter(self.parts.items()), (0, part))
        for name in ("action", "proprio"):
            if (width := part[name].shape[1]) != usual[name].shape[1]:
                raise ValueError(f"its {name} has {width} numbers, that of episode {number} {usual[name].shape[1]}")
        return part | places

    def _frames(self, key: str, episode: EpisodeEntry, times: NDArray[np.float64]) -> NDArray[np.int64]:
        clip = episode.clips[key]
        video, packets = self.videos[clip.path]
        found = match(video, packets, clip.start + times, self.metadata.fps)
        if (absent := np.flatnonzero(found < 0)).size:
            if video.problem and not len(packets):
                raise NoPictureError(clip.path, video.problem)
            frame, why = absent[0], f" ({video.problem})" if video.problem else ""
            raise NoPictureError(
                clip.path,
                f"there is no picture for frame {frame}, at {clip.start + times[frame]:.4f} s, "
                f"and for {len(absent)} of {len(times)} frames altogether{why}",
            )
        places = packets[found]
        return np.stack([np.full(len(found), self.files[clip.path]), places[:, 1], places[:, 2]], axis=1)

    def _pictures(self, rows: Rows, key: str) -> NDArray[np.int64]:
        places = rows.columns[key]
        return np.column_stack([np.full(len(places), self.files[records_of(rows.file, self.pictures)]), places])

    def _keep_raw(self, rows: Rows) -> None:
        for name, column in rows.columns.items():
            if name in ROW_COLUMNS:  # which `info.json` does not always list
                continue
            if self.metadata.features[name].dtype.startswith("float") and column.ndim == 2:
                self.raw.setdefault(name, []).append(column)

    def _check_counts(self) -> None:
        info, episodes = self.metadata.info, len(self.metadata.episodes)
        said = int(info.get("total_episodes", episodes))
        for trajectory in range(episodes, said):
            self.leave_out(INFO, trajectory, f"total_episodes is {said}, but meta/ describes {episodes}")
        if said < episodes:
            self.leave_out(INFO, -1, f"total_episodes is {said}, but meta/ describes {episodes}")
        described = sum(episode.length for episode in self.metadata.episodes)
        if (total := int(info.get("total_frames", described))) not in (described, self.rows_found):
            self.leave_out(INFO, -1, f"total_frames is {total}, but the episodes have {described}")

    def _shards(self, images: Mapping[str, NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bounds of the steps in each file, for shuffling in windows; empty if a file's steps are not contiguous."""
        role = next(iter(self.cameras), None)
        files = images[role][:, 0] if role else np.zeros(0, np.int64)
        if not len(files) or (np.diff(files) < 0).any():
            return np.zeros(1, np.int64), np.zeros(0, np.int64)
        sizes = [
            self.videos[name][0].size if name in self.videos else _packed(number, images)
            for name, number in self.files.items()
        ]
        return np.searchsorted(files, np.arange(len(self.files) + 1)).astype(np.int64), np.array(sizes, np.int64)


def _packed(number: int, images: Mapping[str, NDArray[np.int64]]) -> int:
    return int(sum(places[places[:, 0] == number, 2].sum() for places in images.values()))


def picture_files(metadata: Metadata, cameras: Mapping[str, str], data_files: list[str]) -> dict[str, int]:
    """Every file with pictures -> its number: first those of the first camera, in the order of the steps."""
    names: list[str] = []
    pictures = picture_features(metadata, cameras)
    for feature in cameras.values():
        if metadata.features[feature].dtype == "image":
            names += [records_of(name, pictures) for name in data_files]
        else:
            names += [episode.clips[feature].path for episode in metadata.episodes]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def place(folder: Path, pictures: Path, name: str) -> Path:
    """The path of a file of the index: copied pictures are in the folder `pictures`, other files in `folder`."""
    return (pictures if name.endswith(PACKED) else folder) / name
