"""The description of an RLDS folder, read without tfds: its versions, its shards, its features."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvla_lightning.data.oxe.registry import action_paths
from openvla_lightning.data.oxe.spec import DatasetSpec, DescriptionError
from openvla_lightning.data.source.faults import BadShardError, absent
from openvla_lightning.data.source.rlds.arrays import observation_features

INFO, FEATURES = "dataset_info.json", "features.json"
METADATA = (INFO, FEATURES)
AGAIN = "Get this file again"
EXACT = re.compile(r"\d+\.\d+\.\d+")
UNDER_WAY = ".incomplete"
"""Suffix of a version's name while tfds builds it."""
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
"""Default names of tfds's shards, if dataset_info.json has no template."""


def newest(versions: list[str]) -> str | None:
    """The highest of some versions such as 1.0.0.

    A name like `1.0.0.bak` or `backup` counts only if no version has the exact form. A version that tfds is still
    building never counts.
    """
    whole = [name for name in versions if UNDER_WAY not in name]
    exact = [name for name in whole if EXACT.fullmatch(name)]
    return max(exact or whole, key=lambda name: [int(n) if n.isdigit() else -1 for n in name.split(".")], default=None)


def version_folder(dataset: Path) -> Path | None:
    """The newest version below a dataset's folder, or the folder itself if it holds the files; else None."""
    found = {path.parent.name: path.parent for path in dataset.glob(f"*/{INFO}")}
    if (dataset / INFO).exists():
        found[dataset.name] = dataset
    return found[version] if (version := newest([*found])) is not None else None


@dataclass(frozen=True)
class Split:
    """One split in dataset_info.json: its name, its files in order, and the number of trajectories in each."""

    name: str
    files: tuple[str, ...]
    lengths: tuple[int, ...]


def read_splits(folder: Path) -> list[Split]:
    """The splits that dataset_info.json names.

    Raises:
        BadShardError: it is no JSON, or lacks a required entry.
    """
    info = _json(folder / INFO)
    splits = info.get("splits")
    if not isinstance(splits, list) or not splits:
        raise BadShardError(f"{folder / INFO} names no splits. {AGAIN}")
    try:
        return [_split(info, split) for split in splits]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        lacks = f"has no {error}" if isinstance(error, KeyError) else "holds what is no name or no number"
        raise BadShardError(
            f"{folder / INFO} {lacks} where tfds writes a split's `name` and `shardLengths` (trajectories of each "
            f"file). {AGAIN}"
        ) from error


def read_features(folder: Path) -> dict[str, Any]:
    """The contents of features.json.

    Raises:
        BadShardError: it is missing, as in folders written before tfds 4.0, or no JSON.
    """
    if not (folder / FEATURES).exists():
        raise BadShardError(
            f"{folder} holds no {FEATURES}: it was written by a tfds older than 4.0. Open it once with its builder "
            "and a newer tfds, which writes the file"
        )
    return _json(folder / FEATURES)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> bytes and time of the last write, for the dataset's existing files; other files are ignored."""
    names = [*METADATA, *(file for split in read_splits(folder) for file in split.files)]
    found = {}
    for name in names:
        try:
            stat = (folder / name).stat()
        except FileNotFoundError:
            continue
        found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def check_description(spec: DatasetSpec, features: Mapping[str, Any]) -> None:
    """Compare the names in a description with features.json, before any data is read.

    With a transform, only the cameras are compared, because its results are not known before it runs.

    Raises:
        DescriptionError: some names do not exist, or name text where numbers are needed or the other way round; the
            message lists them, the existing names, and suggestions.
    """
    if problems := list(_problems(spec, features)):
        where = f"data.datasets.{spec.name}"
        raise DescriptionError("\n    ".join([f"{spec.name}: its files do not hold what {where} names:", *problems]))


def _problems(spec: DatasetSpec, features: Mapping[str, Any]) -> Iterator[str]:
    observation = observation_features(features)
    if not observation:
        return  # not in RLDS layout; reading raises the error
    seen = dict(_leaves({"features": observation}))
    for role, key in spec.cameras.items():
        if key is not None:
            yield from _odd(f"cameras.{role}", key, seen, "observation", ("image", "numbers", "text"))
    if (paths := action_paths(spec)) is None:
        return
    for key in spec.state:
        if key is not None:
            yield from _odd("state", key, seen, "observation", ("numbers",))
    leaves = dict(_leaves(_step(features)))
    for path in paths:
        yield from _odd("action", path, leaves, "a step", ("numbers",))
    episode = {path: kind for path, kind in _leaves(features.get("featuresDict", {})) if not path.startswith("steps/")}
    reachable = {f"{start}{path}": kind for path, kind in episode.items() for start in ("", "traj_metadata/")}
    reachable |= {path.removeprefix("episode_metadata/"): kind for path, kind in episode.items()} | leaves
    if spec.language in reachable:
        yield from _odd("language", spec.language, reachable, "", ("text",))
    else:
        yield absent("language", spec.language, [*leaves, *episode], "a step or its episode")


def _odd(option: str, key: str, leaves: Mapping[str, str], where: str, fitting: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the `key` that an option names: it is not there, or of another kind than `fitting`."""
    if key not in leaves and (below := [path for path in leaves if path.startswith(f"{key}/")]):
        yield f"{option}: {key!r} is a group: name one of {', '.join(sorted(below))}"
    elif key not in leaves:
        yield absent(option, key, list(leaves), where)
    elif (kind := leaves[key]) not in (*fitting, "other"):
        yield f"{option}: {key!r} is {kind}, not {fitting[0]}"


def _kind(feature: Mapping[str, Any]) -> str:
    if "image" in feature:
        return "depth" if feature["image"].get("dtype", "uint8").startswith("float") else "image"
    if "text" in feature or feature.get("tensor", {}).get("dtype") in ("string", "object"):
        return "text"
    return "numbers" if "tensor" in feature else "other"


def _step(features: Mapping[str, Any]) -> Mapping[str, Any]:
    steps = features["featuresDict"]["features"]["steps"]
    return steps.get("sequence", {}).get("feature", {}).get("featuresDict", {})


def _leaves(dictionary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and kind of every leaf: `image`, `depth`, `text`, `numbers` or `other`."""
    for key, feature in dictionary.get("features", {}).items():
        if "featuresDict" in feature:
            yield from _leaves(feature["featuresDict"], f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", _kind(feature)


def _split(info: Mapping[str, Any], split: Mapping[str, Any]) -> Split:
    lengths = tuple(int(length) for length in split.get("shardLengths", ()))
    if any(length < 0 for length in lengths) or not isinstance(split["name"], str):
        raise ValueError(f"{split['name']}: {lengths}")
    total = len(lengths)
    digits = max(5, len(str(total)))
    values = {
        "{DATASET}": info["name"],
        "{SPLIT}": split["name"],
        "{FILEFORMAT}": info.get("fileFormat", "tfrecord"),
        "{NUM_SHARDS}": f"{total:0{digits}d}",
    }
    files = []
    for place in range(total):
        name = split.get("filepathTemplate") or TEMPLATE
        index = f"{place:0{digits}d}"
        own = values | {"{SHARD_INDEX}": index, "{SHARD_X_OF_Y}": f"{index}-of-{total:0{digits}d}"}
        for key, value in own.items():
            name = name.replace(key, value)
        files.append(name)
    return Split(split["name"], tuple(files), lengths)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadShardError(f"{path} is no JSON: {error}. {AGAIN}.") from error
    if not isinstance(content, dict):
        raise BadShardError(f"{path} holds no JSON object. {AGAIN}.")
    return content
