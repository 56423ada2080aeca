"""Measurements of an indexed dataset's actions."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.actions import dimension_names
from openvla_lightning.data.filters import noops, pieces
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.index import Index
from openvla_lightning.statistics import DatasetStatistics

BINS = 48
STILL = 0.01
"""Share of the usual range that counts as no movement, for a dataset without a threshold."""


@dataclass(frozen=True)
class Dimension:
    """One dimension of the actions that are trained on.

    Attributes:
        name: name of the dimension.
        normalised: whether q01..q99 are mapped to -1..1; otherwise values do not change.
        low, q01, q99, high: extremes and quantiles of the dataset's statistics.
        mean, std: of the same.
        outside: share of values below q01 or above q99, which are clipped.
        at_bounds: share of values at q01 or q99 or outside, which the model sees as -1 or 1.
        usual: the median.
        usually: share of values that equal the median.
        binary: share of values that are 0 or 1, or -1 or 1.
        edges: float64 [BINS + 1], edges of the histogram.
        counts: int64 [BINS]; the outermost bins also count the values beyond them.
    """

    name: str
    normalised: bool
    low: float
    q01: float
    q99: float
    high: float
    mean: float
    std: float
    outside: float
    at_bounds: float
    usual: float
    usually: float
    binary: float
    edges: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def constant(self) -> bool:
        """Whether the dimension never changes; it is then normalised to 0."""
        return self.low == self.high

    @property
    def reach(self) -> float:
        """How far the farthest value lies outside q01..q99, in widths of that range."""
        width = self.q99 - self.q01
        return max(self.q01 - self.low, self.high - self.q99) / width if width else 0.0


@dataclass(frozen=True)
class Idle:
    """How many steps of a dataset stand still, before any filter.

    Attributes:
        threshold: norm of the changing dimensions below which a step stands still.
        given: whether the dataset defines the threshold; otherwise it is a share of the usual range.
        share: share of all steps.
        first, last: share of the trajectories whose first or last step stands still.
        runs: int64 [R], numbers of successive steps that stand still.
        trained: share of the training steps.
        trained_first: share of training trajectories that begin with a no-op.
    """

    threshold: float
    given: bool
    share: float
    first: float
    last: float
    runs: NDArray[np.int64]
    trained: float
    trained_first: float


@dataclass(frozen=True)
class Duplicates:
    """Trajectories with identical actions.

    Attributes:
        trained: trajectories that are trained on.
        copies: trained trajectories that repeat another one.
        held_out: trajectories held out for validation.
        leaked: held-out trajectories whose actions are also trained on.
    """

    trained: int
    copies: int
    held_out: int
    leaked: int


def measure_actions(
    index: Index, statistics: DatasetStatistics, train: NDArray[Any]
) -> tuple[tuple[Dimension, ...], float]:
    """Each dimension's facts, and the share of steps that normalising clips."""
    dimensions, beyond = [], np.zeros(len(train), bool)
    for d, name in enumerate(dimension_names(index.action.shape[1])):
        numbers = {key: float(values[d]) for key, values in statistics.action.items() if key != "mask"}
        low, q01, q99, high = (numbers[key] for key in ("min", "q01", "q99", "max"))
        values = index.action[train, d]  # one column at a time: a dataset may be larger than memory
        normalised = bool(statistics.mask[d])
        below, above = values < np.float32(q01), values > np.float32(q99)
        if normalised:
            beyond |= below | above
        edges = _edges(q01, q99, low, high) if normalised and q01 < q99 else _edges(low, high, low, high)
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        at_bounds = (values <= np.float32(q01)) | (values >= np.float32(q99))
        usual = np.quantile(values, 0.5, method="lower") if len(values) else np.nan
        zero_one, minus_one = np.isin(values, (0, 1)), np.isin(values, (-1, 1))
        dimensions.append(
            Dimension(
                name=name,
                normalised=normalised,
                low=low,
                q01=q01,
                q99=q99,
                high=high,
                mean=numbers["mean"],
                std=numbers["std"],
                outside=_share(below | above),
                at_bounds=_share(at_bounds),
                usual=float(usual),
                usually=_share(values == usual),
                binary=max(_share(zero_one), _share(minus_one)),
                edges=edges,
                counts=counts,
            )
        )
    return tuple(dimensions), _share(beyond)


def movement(actions: NDArray[Any], absolute: NDArray[np.bool_], std: NDArray[Any]) -> NDArray[np.float64]:
    """How far each step of a trajectory goes: the norm over its dimensions, each in standard deviations of its values.

    Args:
        actions: [T, D] of one trajectory.
        absolute: bool [D], the dimensions that are positions: what counts is how they differ from the step before.
        std: [D]; dimensions that never change (0) do not count.

    Returns:
        float64 [T].
    """
    moved = np.array(actions, np.float64)
    moved[:, absolute] = np.diff(moved[:, absolute], axis=0, prepend=moved[:1, absolute])
    return np.linalg.norm(moved[:, std > 0] / std[std > 0], axis=1)


def _edges(low: float, high: float, least: float, most: float) -> NDArray[np.float64]:
    margin = 0.25 * (high - low) or 0.5
    ends = max(least, low - margin), min(most, high + margin)
    return np.linspace(*(ends if ends[0] < ends[1] else (low - margin, high + margin)), BINS + 1)


def measure_idle(index: Index, spec: DatasetSpec, statistics: DatasetStatistics, train: NDArray[Any]) -> Idle:
    """Steps at which the robot stands still, by the dataset's own threshold or else by a share of its usual range."""
    given, threshold = spec.noop_threshold is not None, spec.noop_threshold
    if threshold is None:
        changing = ~np.array(spec.absolute_mask(index.action.shape[1]))
        numbers = statistics.action
        usual_range = float(np.linalg.norm((numbers["q99"] - numbers["q01"])[changing]))
        threshold = STILL * usual_range or float(np.finfo(np.float32).tiny)
        spec = replace(spec, noop_threshold=threshold)
    idle = np.concatenate([noops(index, spec, first, last) for first, last in pieces(index)])
    begins = np.zeros(len(idle), bool)
    full = np.diff(index.bounds) > 0
    first, last = index.bounds[:-1][full], index.bounds[1:][full] - 1
    begins[first] = True
    # a run starts where a step is idle and the one before is not, or belongs to another trajectory
    before = np.append(False, idle[:-1]) & ~begins
    after = np.append(idle[1:] & ~begins[1:], False)
    starts, ends = np.flatnonzero(idle & ~before), np.flatnonzero(idle & ~after)
    return Idle(
        threshold=threshold,
        given=given,
        share=_share(idle),
        first=_share(idle[first]),
        last=_share(idle[last]),
        runs=ends - starts + 1,
        trained=_share(idle[train]),
        trained_first=int((idle & begins)[train].sum()) / max(1, len(_trajectories(index, train))),
    )


def find_duplicates(index: Index, train: NDArray[Any], val: NDArray[Any]) -> Duplicates:
    """Trajectories with the same actions as another one, bit for bit."""
    trained, held_out = ([_digest(index, k) for k in _trajectories(index, steps)] for steps in (train, val))
    known = set(trained)
    return Duplicates(len(trained), len(trained) - len(known), len(held_out), sum(one in known for one in held_out))


def _trajectories(index: Index, steps: NDArray[Any]) -> list[int]:
    return np.flatnonzero(np.diff(np.searchsorted(steps, index.bounds))).tolist()


def _digest(index: Index, trajectory: int) -> bytes:
    start, end = index.bounds[trajectory : trajectory + 2].tolist()
    return hashlib.blake2b(index.action[start:end].tobytes(), digest_size=16).digest()


def _share(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if len(flags) else 0.0
