"""Description of datasets: by a decorated function for Open X-Embodiment, by plain values for a user's own."""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np

from openvla_lightning.data.oxe.gripper import meaning, open_is_one
from openvla_lightning.data.oxe.leaves import leaf_at
from openvla_lightning.data.oxe.spec import ACTIONS, ENCODINGS, DatasetSpec, Trajectory, Transform

__all__ = ["DatasetSpec", "action_paths", "check_encodings", "cut", "describe", "join_action", "register"]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _list_of(expected_type: Any) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(entry, expected_type) for entry in value)
    )


def _instance_of(expected_type: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, expected_type)


def _either(*fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(fit(value) for fit in fits)


WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "noop_threshold": ("a number, not below 0", _either(_instance_of(type(None)), _number)),
    "control_hz": ("a number above 0", _either(_instance_of(type(None)), lambda value: _number(value) and value > 0)),
    **dict.fromkeys(
        ("mask", "absolute"), ("a list of true and false", _either(_instance_of(type(None)), _list_of(bool)))
    ),
    **dict.fromkeys(("drop_first", "zero_filter"), ("true or false", _instance_of(bool))),
    **dict.fromkeys(("language", "where", "format"), ("a text", _instance_of(str))),
    **dict.fromkeys(("path", "hub", "transform", "encoding"), ("a text", _instance_of(str | None))),
    "action": ("a path, or a list of paths that are joined", _either(_instance_of(str), _list_of(str))),
    "state": (
        "a path, or a list of paths",
        _either(_instance_of(str | None), _list_of(str | None), lambda value: value in ([], ())),
    ),
    "relative_to": (
        "a list that has the number of a state, or null, for each dimension",
        _either(
            _instance_of(type(None)),
            lambda value: (
                _list_of(int | None)(value) and not any(isinstance(one, bool) or (one or 0) < 0 for one in value)
            ),
        ),
    ),
    "swap": (
        "two roles of `cameras`",
        _either(_instance_of(type(None)), lambda value: _list_of(str)(value) and len(value) == 2),
    ),
}
"""Options of a user's dataset -> what to call their values, and which fit."""


REGISTERED: dict[str, DatasetSpec] = {}
"""Filled when modules that register datasets are imported; use `catalogue` to look one up."""


def register(*names: str, **spec: Any) -> Callable[[Transform], Transform]:
    """Register a standardisation under its datasets' names; the keywords are those of `DatasetSpec`.

    By default, its actions are changes of an end effector's pose and a gripper (`eef_pos`).
    """

    def decorate(transform: Transform) -> Transform:
        for name in names:
            REGISTERED[name] = DatasetSpec(name=name, transform=transform, **{"encoding": "eef_pos"} | spec)
        return transform

    return decorate


def check_encodings(specs: Iterable[DatasetSpec]) -> None:
    """Raise ValueError if one model cannot learn from all of `specs`: their actions mean different things."""
    encodings: dict[str, list[str]] = {}
    for spec in specs:
        encodings.setdefault(spec.encoding or "their own", []).append(spec.name)
    if len(encodings.keys() - {"their own"}) > 1:
        listed = "; ".join(f"{encoding}: {', '.join(names)}" for encoding, names in encodings.items())
        raise ValueError(f"one model cannot learn different action encodings: {listed}. Mix datasets of one encoding.")


def cut(trajectory: Trajectory, steps: slice) -> Trajectory:
    """Slice every leaf along time, except the trajectory's own metadata."""

    def sliced(node: Any) -> Any:
        return {key: sliced(child) for key, child in node.items()} if isinstance(node, dict) else node[steps]

    return {key: node if key == "traj_metadata" else sliced(node) for key, node in trajectory.items()}


def describe(name: str, options: Mapping[str, Any]) -> DatasetSpec:
    """Build the spec of a user's own dataset from plain values, as in a YAML file.

    Args:
        name: name in the mixture and of the folder.
        options: `cameras` (required); `action`, a path or a list of paths to concatenate (default `action`);
            `transform`, the dotted path of a function raw trajectory -> trajectory, applied first; `gripper`,
            `{open: o, closed: c}`, the dataset's values if they are not 1 and 0; the others as in `DatasetSpec`.

    Raises:
        ValueError: an option is unknown, has the wrong form or names something that does not exist.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"data.datasets.{name}={options!r}: expected options, at least `cameras: {{primary: image}}`")
    options = dict(options)
    known = {field.name for field in fields(DatasetSpec)} - {"name", "relative"} | {
        "action",
        "gripper",
        "actions",
        "relative_to",
    }
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"data.datasets.{name}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    for key, (wanted, fits) in WANTED.items():
        if key in options and not fits(options[key]):
            raise ValueError(f"data.datasets.{name}.{key}={options[key]!r}: expected {wanted}")
    cameras = options.pop("cameras", None)
    if not isinstance(cameras, Mapping) or not cameras:
        raise ValueError(
            f"data.datasets.{name}: `cameras` maps roles to keys under observation, e.g. {{primary: image}}"
        )
    for role, key in cameras.items():
        if not isinstance(key, str | None):
            raise ValueError(f"data.datasets.{name}.cameras.{role}={key!r}: expected a key under observation, or null")
    action = options.pop("action", "action")
    function = options.pop("transform", None)
    transform = partial(
        join_action,
        paths=(action,) if isinstance(action, str) else tuple(action),
        first=_function(name, function) if function else None,
    )
    if (gripper := options.pop("gripper", None)) is not None:
        encoding = options.get("encoding")
        places = ENCODINGS[encoding][1] if encoding in ENCODINGS else (-1,)
        opened, closed = meaning(name, gripper)
        transform = partial(open_is_one, first=transform, places=places, opened=opened, closed=closed)
    actions, columns = options.pop("actions", "recorded"), options.pop("relative_to", None)
    if actions not in ACTIONS or (columns is not None and actions == "recorded"):
        raise ValueError(f"data.datasets.{name}.actions={actions}: choose {' or '.join(ACTIONS)}")
    options["relative"] = tuple(columns) if columns is not None else actions == "delta_from_state"
    for key in ("state", "mask", "absolute", "swap"):
        if options.get(key) is not None:
            options[key] = tuple([options[key]] if isinstance(options[key], str) else options[key])
    return DatasetSpec(name=name, transform=transform, cameras=dict(cameras), **options)


def join_action(trajectory: Trajectory, paths: Sequence[str], first: Transform | None = None) -> Trajectory:
    """Put the leaves at `paths` side by side as `action` [T, D]."""
    if first is not None:
        trajectory = first(trajectory)
    leaves = [np.asarray(leaf_at(trajectory, path)) for path in paths]
    columns = [leaf[:, None] if leaf.ndim == 1 else leaf for leaf in leaves]
    return trajectory | {"action": np.concatenate(columns, axis=1).astype(np.float32)}


def action_paths(spec: DatasetSpec) -> tuple[str, ...] | None:
    """Paths of the action in the files; None if there is a transform, which may build it from any data."""
    transform = spec.transform
    if isinstance(transform, partial) and transform.func is open_is_one:
        transform = transform.keywords["first"]
    if not isinstance(transform, partial) or transform.func is not join_action or transform.keywords.get("first"):
        return None
    return tuple(transform.keywords["paths"])


def _function(name: str, path: str) -> Transform:
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"data.datasets.{name}: transform={path!r} cannot be imported: {error}") from None
