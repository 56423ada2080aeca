"""The names of a LeRobot dataset's columns, and the checks of a description that uses them."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.oxe.registry import action_paths
from openvla_lightning.data.oxe.spec import DatasetSpec, DescriptionError
from openvla_lightning.data.source.faults import absent
from openvla_lightning.data.source.lerobot.meta_files import WHOLE
from openvla_lightning.data.source.lerobot.metadata import Metadata


def camera_features(metadata: Metadata, spec: DatasetSpec) -> dict[str, str]:
    """Role -> picture feature, for the roles that have one; GR00T's names (`video.ego`) are resolved.

    Raises:
        DescriptionError: there is no such feature, or it holds no pictures; the message lists the picture features.
    """
    pictures = [name for name, feature in metadata.features.items() if feature.is_picture]
    named = {f"video.{name}": one.get("original_key", name) for name, one in metadata.modality.get("video", {}).items()}
    found, problems = {}, []
    for role, key in spec.cameras.items():
        if key is None:
            continue
        feature = key if key in pictures else named.get(key, key)
        if feature in pictures:
            found[role] = feature
        else:
            problems.append(absent(f"cameras.{role}", key, [*pictures, *named], "the dataset"))
    _refuse(spec, problems)
    return found


def check_description(metadata: Metadata, spec: DatasetSpec) -> None:
    """Compare a description with `info.json`.

    With a transform, only the cameras are compared, because its results are not known before it runs.

    Raises:
        DescriptionError: some names do not exist, or name text where numbers are needed or the other way round; the
            message lists them, the existing names, and suggestions.
    """
    camera_features(metadata, spec)
    if (paths := action_paths(spec)) is None:
        return
    there = [name for name, feature in metadata.features.items() if not feature.is_picture]
    parts = ("state", "action", "annotation")
    there += [f"{part}.{name}" for part in parts for name in metadata.modality.get(part, {})]
    problems = [
        absent("state", key, there, "the dataset") for key in spec.state if key is not None and key not in there
    ]
    problems += [absent("action", path, there, "the dataset") for path in paths if path not in there]
    dtypes = {name: feature.dtype for name, feature in metadata.features.items()}
    numbers = {key: "state" for key in spec.state if key is not None} | dict.fromkeys(paths, "action")
    problems += [
        f"{option}: {key!r} is text, not numbers" for key, option in numbers.items() if dtypes.get(key) == "string"
    ]
    if dtypes.get(spec.language, "string") != "string":
        given = f"{spec.language!r} is {dtypes[spec.language]}"
        problems.append(f"language: {given}, not text (without this option, it is the text of `task_index`)")
    if spec.language not in (*there, "language_instruction"):
        problems.append(absent("language", spec.language, there, "the dataset"))
    _refuse(spec, problems)


def _refuse(spec: DatasetSpec, problems: list[str]) -> None:
    if problems:
        said = f"{spec.name}: its files do not hold what data.datasets.{spec.name} names:"
        raise DescriptionError("\n    ".join([said, *problems]))


def slices(metadata: Metadata, columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The slices that `meta/modality.json` names: `state.arm`, `action.gripper`, ... -> values [T, d]."""
    found: dict[str, NDArray[Any]] = {}
    for part, whole in WHOLE.items():
        for name, entry in metadata.modality.get(part, {}).items():
            key = entry.get("original_key", whole)
            if key in columns:
                found[f"{part}.{name}"] = columns[key][:, int(entry["start"]) : int(entry["end"])]
    for name, entry in metadata.modality.get("annotation", {}).items():
        key = entry.get("original_key", f"annotation.{name}")
        if key in columns:
            found[f"annotation.{name}"] = words(metadata, columns[key])
    return found


def words(metadata: Metadata, numbers: NDArray[Any]) -> NDArray[Any]:
    """Instructions, as UTF-8 bytes [T], of task numbers; texts are taken as they are. Equal ones are one object."""
    given = numbers.ravel().tolist()
    texts = {one: (one if isinstance(one, str) else metadata.tasks[int(one)]).encode() for one in set(given)}
    return np.array([texts[one] for one in given], object)


def draft(metadata: Metadata, name: str) -> str:
    """A YAML file for `conf/data/mix/` with all that the files say, and comments on what the user must check."""
    features = metadata.features
    pictures = [key for key, feature in features.items() if feature.is_picture]
    wrists = [key for key in pictures if "wrist" in key or "hand" in key]
    others = [key for key in pictures if key not in wrists]
    cameras = dict(zip(("primary", "secondary"), others, strict=False)) | dict(zip(("wrist",), wrists, strict=False))
    width = features["action"].width if "action" in features else 0
    named = metadata.info["features"].get("action", {}).get("names")
    names = ", ".join(map(str, named)) if isinstance(named, list) and len(named) == width else "not named"
    steps = sum(episode.length for episode in metadata.episodes)
    lines = [
        "# @package _global_",
        f"# conf/data/mix/{name}.yaml",
        f"# {metadata.folder}: {len(metadata.episodes):,} episodes, {steps:,} steps, {metadata.fps:g} a second, "
        f"LeRobot {metadata.version}",
        *(f"#   {task!r}" for task in list(metadata.tasks.values())[:5]),
        "data:",
        f"  mix: {{{name}: 1.0}}",
        "  datasets:",
        f"    {name}:",
        "      format: lerobot",
        f"      path: {json.dumps(str(metadata.folder), ensure_ascii=False)}",
        "      cameras:                    # the first is what the policy looks through",
        *(f"        {role}: {key}" for role, key in cameras.items()),
        *(f"        # not used: {key}" for key in pictures if key not in cameras.values()),
        *(["      state: [observation.state]"] if "observation.state" in features else []),
        f"      # the action has {width} dimensions: {names}",
        "      # positions (joints, absolute poses) rather than changes? Then one of:",
        f"      # absolute: [{', '.join(['true'] * width)}]",
        "      # actions: delta_from_state",
        "      # is the last dimension a gripper that is 1 open and 0 closed? If not, what it is when open and closed:",
        "      # gripper: {open: -1, closed: 1}",
        "      # no gripper at all, or one to be scaled like a joint:",
        f"      # mask: [{', '.join(['true'] * width)}]",
    ]
    return "\n".join(lines) + "\n"
