"""Statistics of a dataset's actions, and the conversion to the model's units and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Normalisation = Literal["quantile", "minmax", "meanstd"]
Part = Literal["action", "proprio"]
Numbers = dict[str, NDArray[Any]]

BOUNDS = {"quantile": ("q01", "q99"), "minmax": ("min", "max")}
MEASURES = ("mean", "std", "max", "min", "q01", "q99")
EPSILON = 1e-8
DTYPES = {"mask": bool, "relative_to": np.int64}

LIBERO_SUITES = ("spatial", "object", "goal", "10", "90")
ALIASES = (
    ("bridge_orig", "bridge_dataset", "bridge", "bridge_v2"),
    ("fractal20220817_data", "fractal", "rt_1", "google_robot"),
    *((f"libero_{suite}_no_noops", f"libero_{suite}") for suite in LIBERO_SUITES),
    ("libero_10_no_noops", "libero_long"),
)
"""Dataset names that mean the same dataset, including those in released checkpoints."""


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of one dataset's actions and proprioception, in the layout of the released `norm_stats[key]`.

    Attributes:
        action: `mean std max min q01 q99`, each float64 [D], and `mask`, bool [D]: False where a dimension (the
            gripper) is not normalised. Without a mask, every dimension is normalised. If actions are differences
            from the state, also `relative_to`, int64 [D]: the index of that state, or -1.
        proprio: the same measures, float64 [P]; zeros of the action's width when no state was read, as released.
        num_transitions: number of steps that were measured.
        num_trajectories: number of trajectories that were measured.
    """

    action: dict[str, NDArray[Any]]
    proprio: dict[str, NDArray[Any]]
    num_transitions: int = 0
    num_trajectories: int = 0

    @classmethod
    def from_array(
        cls,
        action: ArrayLike,
        proprio: ArrayLike | None = None,
        *,
        mask: Sequence[bool] | None = None,
        num_trajectories: int = 0,
    ) -> Self:
        """Measure actions [N, D] and proprioception [N, P].

        The released recipe: float32 values, mean and std summed in float32, quantiles by linear interpolation.

        Args:
            action: every step's action, un-normalised.
            proprio: every step's proprioception, or None.
            mask: which action dimensions are normalised; None: all of them.
            num_trajectories: how many trajectories the steps come from.

        Raises:
            ValueError: no steps, a NaN, or a mask of another width.
        """
        steps = np.asarray(action, np.float32)
        if steps.ndim != 2 or not len(steps):
            raise ValueError(f"statistics need actions of shape [steps, dimensions], got {list(steps.shape)}")
        if mask is not None and len(mask) != steps.shape[1]:
            raise ValueError(f"the mask has {len(mask)} entries for actions of {steps.shape[1]} dimensions")
        measured = _measure(steps, "action")
        measured["mask"] = np.asarray([True] * steps.shape[1] if mask is None else list(mask), bool)
        if proprio is None:
            state = {name: np.zeros(steps.shape[1]) for name in MEASURES}
        else:
            state = _measure(np.asarray(proprio, np.float32), "proprio")
        return cls(measured, state, len(steps), num_trajectories)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read one entry of the released `norm_stats`."""
        if "action" not in values:
            raise ValueError(f"not a dataset's statistics: there is no 'action' among {', '.join(values) or 'nothing'}")
        action, proprio = (
            {name: np.asarray(numbers, DTYPES.get(name, np.float64)) for name, numbers in values.get(part, {}).items()}
            for part in ("action", "proprio")
        )
        return cls(action, proprio, int(values.get("num_transitions", 0)), int(values.get("num_trajectories", 0)))

    def to_dict(self) -> dict[str, Any]:
        """Return the released layout as lists and numbers; the inverse of `from_dict`."""
        parts = {
            part: {name: numbers.tolist() for name, numbers in getattr(self, part).items()}
            for part in ("action", "proprio")
        }
        return parts | {"num_transitions": self.num_transitions, "num_trajectories": self.num_trajectories}

    @classmethod
    def from_json(cls, path: str | Path, key: str | None = None) -> Self:
        """Read `dataset_statistics.json`, a released `config.json`, or one dataset's own file.

        Args:
            path: the file.
            key: name of the dataset; may be left out if the file has only one.

        Raises:
            FileNotFoundError: no such file.
            KeyError: `key` is unknown, or missing while the file has several; the message lists them.
        """
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        values = values.get("norm_stats") or values
        return cls.from_dict(values if "action" in values else choose(values, key))

    def felt(self, columns: NDArray[np.int64]) -> "DatasetStatistics":
        """The same with only these columns of the proprioception."""
        return replace(self, proprio={name: numbers[columns] for name, numbers in self.proprio.items()})

    def __eq__(self, other: object) -> bool:
        """Equal numbers; NaN is never equal."""
        return isinstance(other, DatasetStatistics) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))

    @property
    def action_dim(self) -> int:
        """Number of action dimensions."""
        return len(self.action["q01"])

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Which action dimensions are normalised, bool [D]."""
        return self.action.get("mask", np.ones(self.action_dim, bool))

    @property
    def relative_to(self) -> NDArray[np.int64] | None:
        """Index of the state that each action dimension is relative to, int64 [D], or -1; None: all are as recorded."""
        return self.action.get("relative_to")

    def normalise(
        self, values: ArrayLike, method: Normalisation = "quantile", part: Part = "action"
    ) -> NDArray[np.float32]:
        """Map values [..., D] to the model's units, float32, bit for bit as released.

        `quantile` maps q01..q99 to -1..1 and clips, `minmax` does the same with the extremes, `meanstd` standardises.
        Dimensions with mask False keep their values, but with the first two methods, constant ones become 0.

        Raises:
            ValueError: another number of dimensions, or an unknown method.
        """
        x, numbers, mask = self._checked(values, part, method)
        x = x.astype(np.float32)
        if method == "meanstd":
            scaled = (x - _f32(numbers["mean"])) / _f32(numbers["std"] + EPSILON)
            return np.where(mask, scaled, x)
        low, high = (numbers[name] for name in BOUNDS[method])
        scaled = np.clip(2 * (x - _f32(low)) / _f32(high - low + EPSILON) - 1, -1, 1)
        constant = numbers["min"] == numbers["max"]
        return np.where(constant, np.float32(0), np.where(mask, scaled, x))

    def unnormalise(
        self, values: ArrayLike, method: Normalisation = "quantile", part: Part = "action"
    ) -> NDArray[np.float64]:
        """Map values [..., D] from the model's units to the dataset's, in float64. Where the mask is False, they stay.

        Raises:
            ValueError: another number of dimensions, or an unknown method.
        """
        x, numbers, mask = self._checked(values, part, method)
        x = x.astype(np.float64)
        if method == "meanstd":
            return np.where(mask, x * numbers["std"] + numbers["mean"], x)
        low, high = (numbers[name] for name in BOUNDS[method])
        return np.where(mask, 0.5 * (x + 1) * (high - low) + low, x)

    def merge(self, *others: "DatasetStatistics") -> "DatasetStatistics":
        """Pool with other datasets' statistics.

        Mean, std, extremes and counts are those of the union. Quantiles cannot be pooled from summaries, so the result
        has the widest q01..q99 of the parts. A dimension is normalised if every part normalises it.

        Raises:
            ValueError: widths differ, or a part has no step count.
        """
        every = [self, *others]
        widths = {len(s.action["q01"]) for s in every}
        if len(widths) > 1:
            raise ValueError(f"cannot merge statistics of {' and '.join(map(str, sorted(widths)))} action dimensions")
        if any(s.relative_to is not None for s in every):
            raise ValueError("cannot merge statistics of actions that are relative to the state")
        counts = np.array([s.num_transitions for s in every], np.float64)
        if (counts < 1).any():
            raise ValueError("cannot merge statistics without num_transitions: the parts' shares are unknown")
        action = _pool([s.action for s in every], counts)
        action["mask"] = np.all([s.mask for s in every], axis=0)
        same = len({len(s.proprio.get("q01", ())) for s in every}) == 1 and "q01" in self.proprio
        proprio = _pool([s.proprio for s in every], counts) if same else {}
        return DatasetStatistics(action, proprio, int(counts.sum()), sum(s.num_trajectories for s in every))

    def _checked(
        self, values: ArrayLike, part: Part, method: str
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]], NDArray[np.bool_]]:
        if method not in ("quantile", "minmax", "meanstd"):
            raise ValueError(f"unknown normalisation {method!r}; choose quantile, minmax or meanstd")
        x = np.asarray(values)
        width = len(getattr(self, part).get("q01", ()))
        if x.ndim < 1 or x.shape[-1] != width:
            raise ValueError(f"expected {width} {part} dimensions in the last axis, got shape {list(x.shape)}")
        numbers = self.action if part == "action" else self.proprio
        return x, numbers, numbers.get("mask", np.ones(width, bool))


def scale_of(
    entry: DatasetStatistics | Mapping[str, Any], method: Normalisation | None = None
) -> tuple[DatasetStatistics, Normalisation]:
    """Statistics and their normalisation: `method`, or the entry's `normalisation`, or else `quantile`."""
    if isinstance(entry, DatasetStatistics):
        return entry, method or "quantile"
    return DatasetStatistics.from_dict(entry), method or entry.get("normalisation") or "quantile"


class UnknownDatasetError(KeyError):
    """There are no action statistics for a dataset, or no dataset was chosen among several."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would put the message in quotes


def choose(norm_stats: Mapping[str, Any], key: str | None) -> Any:
    """Return the entry that `choose_key` finds."""
    return norm_stats[choose_key(norm_stats, key)]


def choose_key(norm_stats: Mapping[str, Any], key: str | None) -> str:
    """The key in `norm_stats` that `key` means: itself, an alias, or with None the only one.

    Without a key, several entries are resolved to the one marked `latest`, the dataset of the last training.

    Raises:
        UnknownDatasetError: naming the known keys and the nearest one.
    """
    known = ", ".join(norm_stats)
    if key is None:
        latest = [name for name, entry in norm_stats.items() if isinstance(entry, Mapping) and entry.get("latest")]
        candidates = latest or list(norm_stats)
        if len(candidates) != 1:
            raise UnknownDatasetError(
                f"statistics of several datasets: pass unnorm_key as one of {known or '(there are none)'}"
            )
        return candidates[0]
    if key in norm_stats:
        return key
    same = [name for group in ALIASES if key in group for name in group if name in norm_stats]
    if len(same) == 1:
        return same[0]
    near = get_close_matches(key, norm_stats, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    raise UnknownDatasetError(f"no statistics for unnorm_key {key!r};{hint} known: {known or '(none)'}")


def _f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def _measure(steps: NDArray[np.float32], part: str) -> dict[str, NDArray[Any]]:
    bad = np.flatnonzero(~np.isfinite(steps).all(axis=1))
    if len(bad):
        raise ValueError(f"{part} of step {bad[0]} is not finite ({len(bad)} such steps): {steps[bad[0]].tolist()}")
    quantiles = np.quantile(steps, [0.01, 0.99], axis=0)  # interpolated in float64, as in the released files
    measured = {
        "mean": steps.mean(axis=0),
        "std": steps.std(axis=0),
        "max": steps.max(axis=0),
        "min": steps.min(axis=0),
        "q01": quantiles[0],
        "q99": quantiles[1],
    }
    return {name: numbers.astype(np.float64) for name, numbers in measured.items()}


def _pool(parts: list[dict[str, NDArray[Any]]], counts: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    stacked = {name: np.stack([part[name] for part in parts]) for name in MEASURES}
    share = (counts / counts.sum())[:, None]
    mean = (share * stacked["mean"]).sum(axis=0)
    variance = (share * (stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)).sum(axis=0)
    return {
        "mean": mean,
        "std": np.sqrt(variance),
        "max": stacked["max"].max(axis=0),
        "min": stacked["min"].min(axis=0),
        "q01": stacked["q01"].min(axis=0),
        "q99": stacked["q99"].max(axis=0),
    }
