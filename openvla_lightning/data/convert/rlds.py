"""RLDS -> LeRobot v3.0."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.convert.verification import Columns, Verified, compare, texts
from openvla_lightning.data.images import Pixels, decode
from openvla_lightning.data.oxe.catalogue import UnregisteredDatasetError, dataset_spec
from openvla_lightning.data.source.lerobot.encoding import Encoding
from openvla_lightning.data.source.lerobot.metadata import ROW_COLUMNS, Feature
from openvla_lightning.data.source.lerobot.reading import EpisodeReader
from openvla_lightning.data.source.lerobot.writer import Recording, write_lerobot
from openvla_lightning.data.source.rlds.arrays import Layout
from openvla_lightning.data.source.rlds.description import version_folder
from openvla_lightning.data.source.rlds.episodes import Episodes, Leaf, leaf_of, leaves_of, once_of, texts_of


@dataclass(frozen=True)
class Names:
    """Names of a step's leaves in the LeRobot dataset.

    Attributes:
        columns, cameras: path in a step -> feature.
        pixels: path in a step -> layout, of the cameras whose images are stored as numbers.
        action: paths that make up `action`.
        language: path of the instruction.
    """

    columns: Mapping[str, str]
    cameras: Mapping[str, str]
    pixels: Mapping[str, Layout]
    action: tuple[str, ...]
    language: str


class RecordingOf:
    """Maps an episode's number to a `Recording` for LeRobot's writer; picklable."""

    def __init__(self, episodes: Episodes, names: Names, decoded: Mapping[str, bool]) -> None:
        self.episodes, self.names, self.decoded = episodes, names, decoded

    def __call__(self, number: int) -> Recording:
        steps, names = self.episodes(number), self.names
        columns = {feature: leaf_of(steps, path) for path, feature in names.columns.items()}
        columns["action"] = joined([leaf_of(steps, path) for path in names.action])
        pictures: dict[str, Sequence[Any]] = {}
        for path, feature in names.cameras.items():
            stored = shown(steps, path, names)
            pictures[feature] = [_decoded(one) for one in stored] if self.decoded[feature] else stored
        return Recording(columns, pictures, texts_of(steps, names.language))


def shown(steps: Mapping[str, Any], path: str, names: Names) -> list[bytes | Pixels]:
    """A camera's pictures: encoded, or uint8 [H, W, 3] if the dataset stores them as numbers."""
    if (layout := names.pixels.get(path)) is None:
        return leaf_of(steps, path).tolist()
    found = [layout.pixels(one) if isinstance(one, bytes) else one for one in leaf_of(steps, path)]
    return [one[..., :3] if one.shape[2] > 1 else np.repeat(one, 3, axis=2) for one in found]


def to_lerobot(
    source: Path,
    target: Path,
    *,
    fps: float | None = None,
    action: Sequence[str] = ("action",),
    language: str = "language_instruction",
    pictures: str = "video",
    encoding: Encoding | None = None,
    robot_type: str | None = None,
    episodes_per_file: int = 50,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> Verified:
    """Convert an RLDS dataset: all data of a step, under LeRobot's names.

    `observation/state` becomes `observation.state`, an image `observation/image` becomes `observation.images.image`,
    the leaves at `action` become `action`, and other leaves keep their path with dots. Where LeRobot uses such a name
    itself, `.recorded` is appended.

    Args:
        source: `<name>` or `<name>/<version>` of an RLDS dataset.
        target: folder of the new dataset.
        fps: steps per second; None: the control rate in the dataset's description.
        action: paths that are concatenated to `action`.
        language: path of the instruction.
        pictures: `video`, or `png`, which is lossless and ten times as large.
        encoding: encoding of the videos.
        robot_type: LeRobot's name of the robot.
        episodes_per_file: episodes in one file.
        workers: processes; None: one per core.
        say: called with messages about data that is left out.

    Raises:
        FileNotFoundError: there is no RLDS dataset.
        KeyError: a path is not there.
        ValueError: what a path names is of another kind, or no episode has a step.
        ConversionError: the written data differs from the source.
    """
    folder = version_folder(source) or (source if (source / "dataset_info.json").exists() else None)
    if folder is None:
        raise FileNotFoundError(f"{source} holds no dataset_info.json, so it is no RLDS dataset")
    leaves = leaves_of(folder)
    names = _names(leaves, action, language)
    rate = _known_rate(folder.parent.name) if fps is None else fps  # before all files are looked through
    episodes = Episodes(folder, language)
    if not (full := [number for number, length in enumerate(episodes.lengths) if length]):
        raise ValueError(f"{folder}: no episode has a step")
    first = episodes(full[0])
    features = {feature: _feature(leaf_of(first, path), leaves[path]) for path, feature in names.columns.items()}
    width = joined([leaf_of(first, path) for path in action]).shape[1]
    features["action"] = Feature("float32", (width,))
    for path, feature in names.cameras.items():
        height, wide = _decoded(shown(first, path, names)[0]).shape[:2]
        features[feature] = Feature("video" if pictures == "video" else "image", (height, wide, 3))
    for why, left in (
        ("as LeRobot has one text a step", [path for path, leaf in leaves.items() if leaf.kind == "text"]),
        ("as LeRobot has no place for it", [path for path, leaf in leaves.items() if leaf.kind == "other"]),
        ("as it is said once per episode", once_of(folder)),
    ):
        if left := [path for path in left if path != language]:
            say(f"left out, {why}: {', '.join(left)}")
    if empty := len(episodes.lengths) - len(full):
        say(f"left out, as they have no step: {empty} episodes")
    decoded = dict.fromkeys(names.cameras.values(), pictures == "video")
    record = RecordingOf(episodes, names, decoded)
    write_lerobot(
        target,
        features,
        [episodes.lengths[number] for number in full],
        episodes.words,
        Renumbered(record, full),
        fps=rate,
        robot_type=robot_type,
        splits={name: (_before(full, a), _before(full, b)) for name, (a, b) in episodes.splits.items()},
        episodes_per_file=episodes_per_file,
        encoding=encoding,
        workers=workers,
    )
    return compare(len(full), _as_read(Renumbered(record, full)), EpisodeReader(target))


class Renumbered:
    """Maps consecutive numbers to the episodes that are not empty."""

    def __init__(self, record: RecordingOf, numbers: Sequence[int]) -> None:
        self.record, self.numbers = record, numbers

    def __call__(self, number: int) -> Recording:
        return self.record(self.numbers[number])


def _as_read(record: Callable[[int], Recording]) -> Any:
    def read(number: int) -> tuple[Columns, Mapping[str, Callable[[int], Pixels]]]:
        recording = record(number)
        columns: dict[str, NDArray[Any]] = {
            name: np.asarray(column).reshape(len(column), -1) for name, column in recording.columns.items()
        }
        return columns | {"task": texts(recording.tasks)}, {
            key: lambda step, shown=shown: _decoded(shown[step]) for key, shown in recording.pictures.items()
        }

    return read


def _decoded(picture: bytes | Pixels) -> Pixels:
    return decode(picture) if isinstance(picture, bytes) else picture


def _names(leaves: Mapping[str, Leaf], action: Sequence[str], language: str) -> Names:
    if absent := [path for path in (*action, language) if path not in leaves]:
        raise KeyError(f"no {', '.join(absent)}: a step holds {', '.join(leaves)}")
    if leaves[language].kind != "text":
        raise ValueError(f"{language} is {leaves[language].kind}, not the text of an instruction")
    if other := [path for path in action if leaves[path].kind in ("image", "pixels", "text", "other")]:
        raise ValueError(f"{other[0]} is {leaves[other[0]].kind}, not the numbers of an action")
    columns, cameras = dict[str, str](), dict[str, str]()
    pixels: dict[str, Layout] = {}
    taken = {"action", *ROW_COLUMNS}
    for path, leaf in leaves.items():
        name = path.replace("/", ".")
        if leaf.kind in ("image", "pixels"):
            name = f"observation.images.{name.removeprefix('observation.')}"
        elif leaf.kind in ("text", "other") or path in action:
            continue
        while name in taken:
            name += ".recorded"
        taken.add(name)
        (cameras if leaf.kind in ("image", "pixels") else columns)[path] = name
        if leaf.kind == "pixels":
            pixels[path] = Layout.of({"shape": leaf.shape, "stored": leaf.encoding})
    return Names(columns, cameras, pixels, tuple(action), language)


def _feature(values: NDArray[Any], leaf: Leaf) -> Feature:
    return Feature(leaf.kind, tuple(int(n) for n in values.shape[1:]) or (1,))


def joined(leaves: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Leaves concatenated to float32 [T, D]."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1).astype(np.float32)


def _before(numbers: Sequence[int], bound: int) -> int:
    return int(np.searchsorted(numbers, bound))


def _known_rate(name: str) -> float:
    try:
        rate = dataset_spec(name).control_hz
    except UnregisteredDatasetError:
        rate = None
    if rate is None:
        raise ValueError(f"nobody knows at how many steps a second {name} was recorded: say --fps")
    return rate
