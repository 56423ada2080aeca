"""LeRobot -> RLDS."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.convert.verification import Columns, Verified, compare, texts
from openvla_lightning.data.images import Pixels, decode
from openvla_lightning.data.source.faults import BadTrajectories
from openvla_lightning.data.source.lerobot.reading import EpisodeReader
from openvla_lightning.data.source.rlds.episodes import Episodes, Leaf, declare, leaf_of
from openvla_lightning.data.source.writer import write_rlds

LANGUAGE = "language_instruction"
FLAGS = ("is_first", "is_last", "is_terminal")


class Example:
    """Maps split and number to an example that `write_rlds` takes; picklable."""

    def __init__(self, reader: EpisodeReader, columns: Mapping[str, str], cameras: Mapping[str, str]) -> None:
        self.reader, self.columns, self.cameras = reader, columns, cameras

    def __call__(self, split: str, number: int) -> dict[str, Any]:
        place = self.reader.splits[split][number]
        recorded = self.reader.columns(place)
        steps = len(recorded["task"])
        leaves: dict[str, Any] = {}
        for feature, path in self.columns.items():
            shape = self.reader.features[feature].shape
            leaves[path] = as_stored(recorded[feature]).reshape(steps, *_inner(shape))
        leaves |= {path: self.reader.pictures(feature, place) for feature, path in self.cameras.items()}
        leaves[LANGUAGE] = recorded["task"].tolist()
        flags = np.zeros((3, steps), bool)
        flags[0, 0] = flags[1, -1] = flags[2, -1] = True
        leaves |= dict(zip(FLAGS, flags, strict=True))
        return {"steps": [nested({path: leaf[step] for path, leaf in leaves.items()}) for step in range(steps)]}


def to_rlds(
    source: Path,
    target: Path,
    *,
    episodes_per_shard: int = 64,
    workers: int | None = None,
    bad_trajectories: BadTrajectories = "error",
    say: Callable[[str], None] = print,
) -> Verified:
    """Convert a LeRobot dataset: every column, every camera, one instruction per step.

    `observation.state` becomes `observation/state`, `observation.images.front` becomes `observation/front`, `action`
    stays `action`, and other columns keep their names with slashes. A path that would lie below another one keeps its
    dots (`action.gripper` beside `action`); a name that the new dataset has itself (`is_first`) gets `.recorded`.
    64-bit floats become 32-bit floats. Video frames become JPEGs of quality 95 without chroma subsampling; stored
    pictures are copied unchanged.

    Args:
        source: folder of the dataset.
        target: `<name>/<version>` of the new dataset.
        episodes_per_shard: episodes in one file.
        workers: processes; None: one per core.
        bad_trajectories: `skip` leaves out unreadable episodes.
        say: called with messages about data that is left out.

    Raises:
        BadShardError: the dataset cannot be read.
        ConversionError: the written data differs from the source.
    """
    reader = EpisodeReader(source, bad_trajectories)
    for one in reader.source.index.skipped:
        say(f"left out: {one['file']}, episode {one['trajectory']}: {one['reason']}")
    cameras = {key: f"observation/{key.removeprefix('observation.').removeprefix('images.')}" for key in reader.cameras}
    columns = _paths(list(reader.features), (LANGUAGE, *FLAGS, *cameras.values()))
    leaves: dict[str, Leaf] = {}
    for feature, path in columns.items():
        known = reader.features[feature]
        dtype = "float32" if known.dtype == "float64" else known.dtype
        leaves[path] = Leaf("text") if dtype == "string" else Leaf(dtype, _inner(known.shape))
    for feature, path in cameras.items():
        leaves[path] = Leaf("image", (None, None, 3), _encoding(reader, feature))
    leaves |= {LANGUAGE: Leaf("text")} | dict.fromkeys(FLAGS, Leaf("bool"))
    example = Example(reader, columns, cameras)
    write_rlds(
        target,
        declare(leaves),
        {name: len(places) for name, places in reader.splits.items() if places},
        example,
        episodes_per_shard=episodes_per_shard,
        workers=workers,
        recipe={"converted_from": str(source)},
    )
    order = [place for name in reader.splits for place in reader.splits[name]]
    return compare(len(order), _as_read(reader, order), _written(target, columns, cameras))


def _paths(features: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Column -> its path in an RLDS step. No path is another one, or lies below it."""
    found: dict[str, str] = {}
    for feature in sorted(features, key=lambda name: name.count(".")):
        path = feature.replace(".", "/")
        others = [*taken, *found.values()]
        if any(path.startswith(f"{other}/") or other.startswith(f"{path}/") or path == other for other in others):
            path = feature if feature not in others else f"{feature}.recorded"
        found[feature] = path
    return {feature: found[feature] for feature in features}


def _as_read(reader: EpisodeReader, order: Sequence[int]) -> Any:
    def read(number: int) -> tuple[Columns, Mapping[str, Callable[[int], Pixels]]]:
        columns, cameras = reader(order[number])
        return {name: as_stored(values) for name, values in columns.items()}, cameras

    return read


def _written(target: Path, columns: Mapping[str, str], cameras: Mapping[str, str]) -> Any:
    episodes = Episodes(target, LANGUAGE)

    def read(number: int) -> tuple[Columns, Mapping[str, Callable[[int], Pixels]]]:
        steps = episodes(number)
        found = {feature: leaf_of(steps, path) for feature, path in columns.items()}
        shown = {
            feature: texts(values.tolist()) if values.dtype == object else values.reshape(len(values), -1)
            for feature, values in found.items()
        }
        pictures = {feature: leaf_of(steps, path) for feature, path in cameras.items()}
        return shown | {"task": texts(leaf_of(steps, LANGUAGE).tolist())}, {
            key: lambda step, encoded=encoded: decode(encoded[step]) for key, encoded in pictures.items()
        }

    return read


def _encoding(reader: EpisodeReader, camera: str) -> str:
    first = reader.source.encoded(camera, 0)
    return "png" if first is not None and first.startswith(b"\x89PNG") else "jpeg"


def _inner(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if shape == (1,) else shape


def as_stored(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers in the form that RLDS stores: its floats have 32 bits."""
    return values.astype(np.float32) if values.dtype == np.float64 else values


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dictionaries from a mapping of paths to values."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
