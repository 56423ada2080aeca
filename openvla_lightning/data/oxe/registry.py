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

from openvla_lightning.data.oxe.gripper import meaning, open_is_one
from openvla_lightning.data.oxe.leaves import leaf_at, put_at

__all__ = ["leaf_at", "put_at"]

Trajectory = dict[str, Any]
"""One whole trajectory as nested dicts of NumPy arrays [T, ...]; strings are bytes."""

Transform = Callable[[Trajectory], Trajectory]


ENCODINGS: dict[str, tuple[int, tuple[int, ...]]] = {
    "eef_pos": (7, (6,)),
    "eef_r6": (10, (9,)),
    "joint_pos": (8, (7,)),
    "joint_pos_bimanual": (14, (6, 13)),
}
"""Action encodings as released: how many dimensions, and which of them are grippers (absolute and not normalised)."""


FORMATS = ("rlds", "lerobot")


class UnregisteredDatasetError(ValueError):
    """A mixture names a dataset that nobody has described."""


class DescriptionError(ValueError):
    """A dataset's description names something that its files do not hold, or is of another width than its actions."""


@dataclass(frozen=True)
class DatasetSpec:
    """What the reader has to know of a dataset.

    Attributes:
        name: its name in a mixture; also its folder below the data directory and its `unnorm_key`.
        transform: raw trajectory -> one with `action` [T, D] and the keys below.
        cameras: role (`primary`, `secondary`, `wrist`) -> key under `observation`; None: black images.
        state: keys under `observation` that make up the proprioception; None is a column of zeros.
        encoding: what the action's dimensions are, one of `ENCODINGS`; None: anything, the last is the gripper.
        mask: which action dimensions are normalised; None: all but the grippers.
        absolute: which action dimensions hold a position rather than a change; None: only the grippers.
        language: where the instruction is after `transform`, as a path like `observation/instruction`.
        noop_threshold: norm of the changing dimensions below which the robot stands still, in the dataset's units;
            None: this dataset has no such filter.
        drop_first: the first step is a no-op, which the released transform drops.
        zero_filter: steps without any movement are left out, as released for DROID.
        swap: two roles whose images change places in half of the samples, as released for DROID.
        control_hz: steps per second, where known.
        where: how to get the data.
        format: how it is stored, `rlds` or `lerobot`.
        path: where a LeRobot dataset lies, if not under its name below the data directory; a folder or a URL.
        hub: its id on the Hugging Face hub (`owner/name`, or `owner/name@revision`), from where it is downloaded.
    """

    name: str
    transform: Transform
    cameras: Mapping[str, str | None]
    state: tuple[str | None, ...] = ()
    encoding: str | None = None
    mask: tuple[bool, ...] | None = None
    absolute: tuple[bool, ...] | None = None
    language: str = "language_instruction"
    noop_threshold: float | None = None
    drop_first: bool = False
    zero_filter: bool = False
    swap: tuple[str, str] | None = None
    control_hz: float | None = None
    where: str = ""
    format: str = "rlds"
    path: str | None = None
    hub: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"{self.name}: unknown format {self.format!r}; known: {', '.join(FORMATS)}")
        if bool(self.hub) + bool(self.path) > (self.format == "lerobot"):
            raise ValueError(f"{self.name}: `path` or `hub`, one of them, goes with `format: lerobot`")
        if self.encoding is not None and self.encoding not in ENCODINGS:
            raise ValueError(f"{self.name}: unknown encoding {self.encoding!r}; known: {', '.join(ENCODINGS)}")
        if unknown := [role for role in self.swap or () if role not in self.cameras]:
            raise ValueError(f"{self.name}: swap names {', '.join(unknown)}; its cameras are {', '.join(self.cameras)}")

    def action_mask(self, dim: int) -> tuple[bool, ...]:
        """Which of `dim` action dimensions are normalised."""
        return self._checked(self.mask, dim, "mask") or tuple(i not in self._grippers(dim) for i in range(dim))

    def absolute_mask(self, dim: int) -> tuple[bool, ...]:
        """Which of `dim` action dimensions hold a position."""
        return self._checked(self.absolute, dim, "absolute") or tuple(i in self._grippers(dim) for i in range(dim))

    def check_width(self, dim: int) -> None:
        """Raise DescriptionError if actions of `dim` dimensions are not what `encoding`, `mask` and `absolute` say."""
        self.action_mask(dim)
        self.absolute_mask(dim)
        expected = ENCODINGS[self.encoding][0] if self.encoding is not None else dim
        if dim != expected:
            raise DescriptionError(
                f"{self.name}: encoding {self.encoding} means {expected} action dimensions, got {dim}"
            )

    def _grippers(self, dim: int) -> tuple[int, ...]:
        return ENCODINGS[self.encoding][1] if self.encoding is not None else (dim - 1,)

    def _checked(self, mask: tuple[bool, ...] | None, dim: int, what: str) -> tuple[bool, ...] | None:
        if mask is not None and len(mask) != dim:
            raise DescriptionError(f"{self.name}: `{what}` has {len(mask)} entries, its actions have {dim} dimensions")
        return mask

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what the reader makes of the files."""
        of_no_concern = dict.fromkeys(("where", "noop_threshold", "zero_filter", "swap", "control_hz"))
        described = asdict(self) | {"transform": _source(self.transform)} | of_no_concern
        for key in ("format", "path", "hub"):
            del described[key]
        return hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()


def _source(function: Any) -> str:
    if isinstance(function, partial):
        return f"{_source(function.func)}{function.args}{sorted(function.keywords.items())}"
    return inspect.getsource(function)


_SPECS: dict[str, DatasetSpec] = {}


def register(*names: str, **spec: Any) -> Callable[[Transform], Transform]:
    """Register a standardisation under its datasets' names; the keywords are those of `DatasetSpec`.

    Unless they say otherwise, its actions are changes of an end effector's pose and a gripper (`eef_pos`).
    """

    def decorate(transform: Transform) -> Transform:
        for name in names:
            _SPECS[name] = DatasetSpec(name=name, transform=transform, **{"encoding": "eef_pos"} | spec)
        return transform

    return decorate


def known_datasets() -> list[str]:
    """Names that a mixture may use without describing them."""
    _load()
    return sorted(_SPECS)


def check_names(names: Iterable[str], described: Iterable[str] = ()) -> None:
    """Raise UnregisteredDatasetError for the names that are neither known nor in `described`."""
    _load()
    known = {*_SPECS, *described}
    problems = []
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=2)
            problems.append(f"{name!r}" + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""))
    if problems:
        raise UnregisteredDatasetError(
            f"unknown dataset in the mixture: {', '.join(problems)}. Known: {', '.join(sorted(known))}. "
            f"Describe your own under data.datasets (docs/data.md)."
        )


def dataset_spec(name: str) -> DatasetSpec:
    """Return what is known of dataset `name`.

    Raises:
        UnregisteredDatasetError: nothing is; the message names the nearest known ones.
    """
    check_names([name])
    return _SPECS[name]


def check_encodings(specs: Iterable[DatasetSpec]) -> None:
    """Raise ValueError if one model cannot learn from all of `specs`: their actions mean different things."""
    encodings: dict[str, list[str]] = {}
    for spec in specs:
        encodings.setdefault(spec.encoding or "their own", []).append(spec.name)
    if len(encodings.keys() - {"their own"}) > 1:
        listed = "; ".join(f"{encoding}: {', '.join(names)}" for encoding, names in encodings.items())
        raise ValueError(f"one model cannot learn different action encodings: {listed}. Mix datasets of one encoding.")


def standardise(dataset_name: str, trajectory: Trajectory) -> Trajectory:
    """Bring a raw trajectory of a known dataset into the common form, as released.

    Args:
        dataset_name: a known dataset.
        trajectory: nested dicts of NumPy arrays [T, ...] as stored, strings as bytes, images encoded or not.

    Returns:
        A new trajectory: `action` [T', 7] (six changes of the end effector, then the gripper with 1 = open),
        `language_instruction` [T'], `observation`, and the other keys cut to the same T'.

    Raises:
        UnregisteredDatasetError: nobody described it.
    """
    spec = dataset_spec(dataset_name)
    standardised = spec.transform(trajectory)
    return cut(standardised, slice(1, None)) if spec.drop_first else standardised


def cut(trajectory: Trajectory, steps: slice) -> Trajectory:
    """Slice every leaf along time, but for the trajectory's own metadata."""

    def sliced(node: Any) -> Any:
        return {key: sliced(child) for key, child in node.items()} if isinstance(node, dict) else node[steps]

    return {key: node if key == "traj_metadata" else sliced(node) for key, node in trajectory.items()}


def describe(name: str, options: Mapping[str, Any]) -> DatasetSpec:
    """Build the spec of a user's own dataset from plain values, as in a YAML file.

    Args:
        name: name in the mixture and of the folder.
        options: `cameras` (needed); `action`, a path or a list of paths to join (default `action`); `transform`, the
            dotted path of a function raw trajectory -> trajectory, applied first; `gripper`, `{open: o, closed: c}`,
            what the dataset writes for either, where that is not 1 and 0; the others as in `DatasetSpec`.

    Raises:
        ValueError: an option is unknown, has the wrong form or leads nowhere.
    """
    options = dict(options)
    known = {field.name for field in fields(DatasetSpec)} - {"name"} | {"action", "gripper"}
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
    if (gripper := options.pop("gripper", None)) is not None:
        encoding = options.get("encoding")
        places = ENCODINGS[encoding][1] if encoding in ENCODINGS else (-1,)
        opened, closed = meaning(name, gripper)
        transform = partial(open_is_one, first=transform, places=places, opened=opened, closed=closed)
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
    """Paths of the action in what the files hold; None behind a transform, which may put it together from anything."""
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


def _load() -> None:
    importlib.import_module("openvla_lightning.data.oxe.datasets")
