"""The description of a dataset that its reader needs."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

Trajectory = dict[str, Any]
"""One whole trajectory as nested dicts of NumPy arrays [T, ...]; strings are bytes."""

Transform = Callable[[Trajectory], Trajectory]


ENCODINGS: dict[str, tuple[int, tuple[int, ...]]] = {
    "eef_pos": (7, (6,)),
    "eef_r6": (10, (9,)),
    "joint_pos": (8, (7,)),
    "joint_pos_bimanual": (14, (6, 13)),
}
"""Action encodings as released -> number of dimensions, and which are grippers (absolute and not normalised)."""


FORMATS, ACTIONS = ("rlds", "lerobot"), ("recorded", "delta_from_state")


class DescriptionError(ValueError):
    """A dataset's description names something that its files lack, or has another width than its actions."""


class TransformError(ValueError):
    """A user's own transform failed, or returned something else than a trajectory."""


@dataclass(frozen=True)
class DatasetSpec:
    """Description of a dataset for its reader.

    Attributes:
        name: its name in a mixture; also its folder below the data directory and its `unnorm_key`.
        transform: raw trajectory -> one with `action` [T, D] and the keys below.
        cameras: role (`primary`, `secondary`, `wrist`) -> key under `observation`; None: black images.
        state: keys under `observation` that make up the proprioception; None: a column of zeros.
        encoding: meaning of the action's dimensions, one of `ENCODINGS`; None: any width, the last is the gripper.
        mask: which action dimensions are normalised; None: all but the grippers.
        absolute: which action dimensions hold a position rather than a change; None: only the grippers.
        language: path of the instruction after `transform`, such as `observation/instruction`.
        noop_threshold: norm of the changing dimensions below which the robot stands still, in the dataset's units;
            None: this dataset has no such filter.
        drop_first: whether the first step is a no-op, which the released transform drops.
        zero_filter: whether steps without any movement are left out, as released for DROID.
        swap: two roles whose images are exchanged in half of the samples, as released for DROID.
        control_hz: steps per second, if known.
        where: how to get the data.
        relative: True: actions except the grippers are relative to the state at the start of their chunk. Or the index
            of the state that each dimension is relative to, or None for none; see `data.relative`.
        format: how it is stored, `rlds` or `lerobot`.
        path: folder or URL of a LeRobot dataset; None: its name below the data directory.
        hub: its id on the Hugging Face hub (`owner/name`, or `owner/name@revision`), to download it from there.
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
    relative: bool | tuple[int | None, ...] = False
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

    def transformed(self, raw: Trajectory) -> Trajectory:
        """What `transform` makes of a trajectory.

        Raises:
            TransformError: the user's own function in it raised anything, or returned no dictionary.
        """
        return _guarded(self.transform)(raw)

    def action_mask(self, dim: int) -> tuple[bool, ...]:
        """Which of `dim` action dimensions are normalised."""
        return self._checked(self.mask, dim, "mask") or tuple(i not in self.grippers(dim) for i in range(dim))

    def absolute_mask(self, dim: int) -> tuple[bool, ...]:
        """Which of `dim` action dimensions hold a position."""
        return self._checked(self.absolute, dim, "absolute") or tuple(i in self.grippers(dim) for i in range(dim))

    def check_width(self, dim: int) -> None:
        """Raise DescriptionError if actions of `dim` dimensions do not fit `encoding`, `mask` and `absolute`."""
        self.action_mask(dim)
        self.absolute_mask(dim)
        expected = ENCODINGS[self.encoding][0] if self.encoding is not None else dim
        if dim != expected:
            raise DescriptionError(
                f"{self.name}: encoding {self.encoding} means {expected} action dimensions, got {dim}"
            )

    def to_be_had(self, name: str, root: str | Path) -> str:
        """How to get the data of the dataset `name` below `root`; that it is a dataset itself, if it is one."""
        if (around := _folder_around(Path(root).expanduser())) is not None:
            return f"{root} is a dataset itself; paths.data_dir is the folder around it, paths.data_dir={around}"
        return self.where.format(name=name, root=root) or "put its RLDS folder there"

    def grippers(self, dim: int) -> tuple[int, ...]:
        """Which of `dim` action dimensions are grippers."""
        return ENCODINGS[self.encoding][1] if self.encoding is not None else (dim - 1,)

    def _checked(self, mask: tuple[bool, ...] | None, dim: int, what: str) -> tuple[bool, ...] | None:
        if mask is not None and len(mask) != dim:
            raise DescriptionError(f"{self.name}: `{what}` has {len(mask)} entries, its actions have {dim} dimensions")
        return mask

    @property
    def fingerprint(self) -> str:
        """A hash of everything that affects the index, the source code of the transform included."""
        of_no_concern = dict.fromkeys(("where", "noop_threshold", "zero_filter", "swap", "control_hz"))
        described = asdict(self) | {"transform": _source(self.transform)} | of_no_concern
        for key in ("format", "path", "hub", "relative"):
            del described[key]
        return hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()


def _guarded(transform: Transform) -> Transform:
    """The same, in which what a user wrote is blamed for its errors; what is made around it comes first."""
    if not isinstance(transform, partial) or (first := transform.keywords.get("first")) is None:
        return transform
    inner = _guarded(first) if isinstance(first, partial) else partial(_own, function=first)
    return partial(transform.func, *transform.args, **transform.keywords | {"first": inner})


def _own(trajectory: Trajectory, function: Transform) -> Trajectory:
    name = getattr(function, "__name__", str(function))
    try:
        made = function(trajectory)
    except Exception as error:  # whatever a user's function raises is about this trajectory
        raise TransformError(f"its transform {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, dict):
        raise TransformError(f"its transform {name} returned {type(made).__name__}, not the trajectory: a dictionary")
    return made


def _source(function: Any) -> str:
    if isinstance(function, partial):
        arguments = sorted(
            (key, _source(value) if callable(value) else value) for key, value in function.keywords.items()
        )
        return f"{_source(function.func)}{function.args}{arguments}"
    return inspect.getsource(function)


def _folder_around(folder: Path) -> Path | None:
    """The folder in which a dataset lies, for a dataset's own folder or that of one of its versions; else None."""
    if (folder / "dataset_info.json").is_file():
        return folder.parent.parent if folder.name[:1].isdigit() else folder.parent
    dataset = any(folder.glob("[0-9]*/dataset_info.json")) or (folder / "meta" / "info.json").is_file()
    return folder.parent if dataset else None
