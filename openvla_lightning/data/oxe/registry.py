"""Which datasets are known, and how each becomes 7-dim end-effector actions with one instruction."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

Trajectory = dict[str, Any]
"""One whole trajectory as nested dicts of NumPy arrays [T, ...]; strings are bytes."""

Transform = Callable[[Trajectory], Trajectory]


class UnknownDatasetError(ValueError):
    """A mixture names a dataset that nobody has described."""


@dataclass(frozen=True)
class DatasetSpec:
    """What the reader has to know of a dataset.

    Attributes:
        name: its name in a mixture; also its folder below the data directory and its `unnorm_key`.
        transform: raw trajectory -> one with `action` [T, D] and the keys below.
        cameras: role (`primary`, `secondary`, `wrist`) -> key under `observation`; None: black images.
        state: keys under `observation` that make up the proprioception; None is a column of zeros.
        mask: which action dimensions are normalised; None: all but the last, the gripper.
        absolute: which action dimensions hold a position rather than a change; None: only the last.
        language: where the instruction is after `transform`, as a path like `observation/instruction`.
        noop_threshold: largest norm of the changing dimensions that still counts as standing still, in the dataset's
            units; None: this dataset has no such filter.
        where: how to get the data.
    """

    name: str
    transform: Transform
    cameras: Mapping[str, str | None]
    state: tuple[str | None, ...] = ()
    mask: tuple[bool, ...] | None = None
    absolute: tuple[bool, ...] | None = None
    language: str = "language_instruction"
    noop_threshold: float | None = None
    where: str = ""

    def action_mask(self, dim: int) -> tuple[bool, ...]:
        """Which of `dim` action dimensions are normalised."""
        return _checked(self.mask, dim, self.name, "mask") or (*[True] * (dim - 1), False)

    def absolute_mask(self, dim: int) -> tuple[bool, ...]:
        """Which of `dim` action dimensions hold a position."""
        return _checked(self.absolute, dim, self.name, "absolute") or (*[False] * (dim - 1), True)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what the reader makes of the files."""
        described = asdict(self) | {"transform": _source(self.transform), "where": "", "noop_threshold": None}
        return hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()


def _checked(mask: tuple[bool, ...] | None, dim: int, name: str, what: str) -> tuple[bool, ...] | None:
    if mask is not None and len(mask) != dim:
        raise ValueError(f"{name}: `{what}` has {len(mask)} entries, its actions have {dim} dimensions")
    return mask


def _source(function: Any) -> str:
    if isinstance(function, partial):
        return f"{_source(function.func)}{function.args}{sorted(function.keywords.items())}"
    return inspect.getsource(function)


_SPECS: dict[str, DatasetSpec] = {}
_PENDING: set[str] = set()


def register(*names: str, **spec: Any) -> Callable[[Transform], Transform]:
    """Register a standardisation under its datasets' names; the keywords are those of `DatasetSpec`."""

    def decorate(transform: Transform) -> Transform:
        for name in names:
            _SPECS[name] = DatasetSpec(name=name, transform=transform, **spec)
        return transform

    return decorate


def announce(names: Iterable[str]) -> None:
    """Names that released mixtures use, although their standardisation is not written yet."""
    _PENDING.update(names)


def known_datasets() -> list[str]:
    """Names that a mixture may use without describing them."""
    _load()
    return sorted(_SPECS)


def check_names(names: Iterable[str], described: Iterable[str] = ()) -> None:
    """Raise UnknownDatasetError for the names that are neither known nor in `described`."""
    _load()
    known = {*_SPECS, *_PENDING, *described}
    problems = []
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=2)
            problems.append(f"{name!r}" + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""))
    if problems:
        raise UnknownDatasetError(
            f"unknown dataset in the mixture: {', '.join(problems)}. Known: {', '.join(sorted(known))}. "
            f"Describe your own under data.datasets (docs/data.md)."
        )


def dataset_spec(name: str) -> DatasetSpec:
    """Return what is known of dataset `name`.

    Raises:
        UnknownDatasetError: nothing is; the message names the nearest known ones.
        NotImplementedError: a released dataset whose standardisation is not written yet.
    """
    check_names([name])
    if name not in _SPECS:
        raise NotImplementedError(
            f"{name}: this dataset of the released mixtures has no standardisation here yet; "
            f"describe it under data.datasets, or choose from {', '.join(sorted(_SPECS))}"
        )
    return _SPECS[name]


def standardise(dataset_name: str, trajectory: Trajectory) -> Trajectory:
    """Bring a raw trajectory of a known dataset into the common form, as released.

    Args:
        dataset_name: a known dataset.
        trajectory: nested dicts of NumPy arrays [T, ...] as stored, strings as bytes, images encoded or not.

    Returns:
        A new trajectory: `action` [T', 7] (six changes of the end effector, then the gripper with 1 = open),
        `language_instruction` [T'], `observation`, and the other keys cut to the same T'.

    Raises:
        UnknownDatasetError, NotImplementedError: as `dataset_spec`.
    """
    return dataset_spec(dataset_name).transform(trajectory)


def describe(name: str, options: Mapping[str, Any]) -> DatasetSpec:
    """Build the spec of a user's own dataset from plain values, as in a YAML file.

    Args:
        name: name in the mixture and of the folder.
        options: `cameras` (needed); `action`, a path or a list of paths to join (default `action`); `state`,
            `mask`, `absolute`, `language`, `noop_threshold`, `where` as in `DatasetSpec`; `transform`, the dotted path
            of a function raw trajectory -> trajectory, applied first.

    Raises:
        ValueError: an option is unknown, has the wrong form or leads nowhere.
    """
    options = dict(options)
    known = {field.name for field in fields(DatasetSpec)} - {"name"} | {"action"}
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"data.datasets.{name}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    cameras = options.pop("cameras", None)
    if not isinstance(cameras, Mapping) or not cameras:
        raise ValueError(
            f"data.datasets.{name}: `cameras` maps roles to keys under observation, e.g. {{primary: image}}"
        )
    action = options.pop("action", "action")
    function = options.pop("transform", None)
    transform = partial(
        join_action,
        paths=(action,) if isinstance(action, str) else tuple(action),
        first=_function(name, function) if function else None,
    )
    for key in ("state", "mask", "absolute"):
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


def leaf_at(trajectory: Mapping[str, Any], path: str) -> Any:
    """Return the leaf at a path like `observation/state`.

    Raises:
        KeyError: naming what is there instead.
    """
    node: Any = trajectory
    for i, part in enumerate(path.split("/")):
        if not isinstance(node, Mapping) or part not in node:
            here = "/".join(path.split("/")[:i]) or "the trajectory"
            there = ", ".join(node) if isinstance(node, Mapping) else "an array"
            raise KeyError(f"no {path!r}: {here} holds {there}")
        node = node[part]
    return node


def _function(name: str, path: str) -> Transform:
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"data.datasets.{name}: transform={path!r} cannot be imported: {error}") from None


def _load() -> None:
    importlib.import_module("openvla_lightning.data.oxe.datasets")
