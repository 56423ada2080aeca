"""Selection of the steps of an indexed dataset that are served, with a count of the others."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.index import Index

VALIDATION = ("val", "validation")
NoopFilter = Literal["none", "released", "first_step", "near_zero"]
PIECE = 2**17
"""Steps processed at a time, so that memory does not grow with the dataset and they fit the cache of a core."""


@dataclass(frozen=True)
class FilterReport:
    """Counts of a split: its steps, and the steps that were left out.

    Attributes:
        trajectories: in the split, before filters.
        steps: in the split, before filters.
        unlabelled: trajectories without any instruction, left out as released.
        wordless: steps left out because they have no instruction, in trajectories that have one at other steps.
        refused: steps left out because the model cannot take their instruction.
        first_steps: steps left out because they begin a trajectory.
        zero_actions: steps left out because their action asks for no movement, as released for DROID.
        noops: steps left out because the robot stood still.
        kept: steps that are served.
    """

    trajectories: int
    steps: int
    unlabelled: int
    wordless: int
    refused: int
    first_steps: int
    zero_actions: int
    noops: int
    kept: int

    def to_dict(self) -> dict[str, int]:
        """The same as a dictionary."""
        return asdict(self)


def check_filter(noop_filter: str) -> None:
    """Raise ValueError for a filter that does not exist."""
    if noop_filter not in get_args(NoopFilter):
        raise ValueError(f"data.noop_filter={noop_filter}: choose {', '.join(get_args(NoopFilter))}")


def select(
    source: Source,
    split: str,
    *,
    val_fraction: float,
    noop_filter: NoopFilter,
    refused: Sequence[int] = (),
) -> tuple[NDArray[np.int32], FilterReport]:
    """Return the steps of `split` that are served, ascending, int32 [n], and counts of the others.

    `released` leaves out the same steps as the released pipeline: the first step if it is a known no-op (Bridge), and
    steps without movement (DROID). `first_step` also leaves out every trajectory's first step, which the paper found to
    be enough (appendix C). `near_zero` leaves out the steps of `released` and every step at which the robot stands
    still. Steps without an instruction are never served, nor are those with an instruction in `refused`, which lists
    places in the index's list of instructions.
    """
    check_filter(noop_filter)
    index, spec = source.index, source.spec
    described = (spec.noop_threshold, spec.zero_filter, spec.drop_first, spec.absolute)
    key = repr((split, val_fraction, noop_filter, *described, *refused))
    name = f"steps_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (known := index.kept(name)) is not None:
        return known[0], FilterReport(**known[1])
    trajectories = split_trajectories(index, split, val_fraction, source.name)
    usable = trajectories & labelled(index)
    report = dict.fromkeys(FilterReport.__dataclass_fields__, 0)
    report["trajectories"] = int(trajectories.sum())
    report["steps"] = int(np.diff(index.bounds)[trajectories].sum())
    report["unlabelled"] = int((trajectories & ~usable & (np.diff(index.bounds) > 0)).sum())
    has_words = spoken(index)
    fits = np.ones(len(index.instructions), bool)
    fits[list(refused)] = False
    kept = []
    for first, last in pieces(index):
        served, instruction = usable[index.trajectory[first:last]], index.instruction[first:last]
        for what, left_out in (
            ("wordless", ~has_words[instruction]),
            ("refused", ~fits[instruction]),
            ("first_steps", begins(index, spec, first, last, noop_filter)),
            ("zero_actions", zero_actions(source, first, last) if noop_filter != "none" else None),
            ("noops", noops(index, spec, first, last) if noop_filter == "near_zero" else None),
        ):
            if left_out is not None:
                report[what] += int((served & left_out).sum())
                served &= ~left_out
        kept.append((np.flatnonzero(served) + first).astype(np.int32))
    steps = np.concatenate(kept) if kept else np.zeros(0, np.int32)
    report["kept"] = len(steps)
    return index.keep(name, steps, report), FilterReport(**report)


def pieces(index: Index) -> list[tuple[int, int]]:
    """Bounds of groups of whole trajectories with about `PIECE` steps each."""
    cuts = np.searchsorted(index.bounds, np.arange(PIECE, index.num_steps, PIECE))
    edges = np.unique(np.concatenate([[0], index.bounds[cuts], [index.num_steps]])).tolist()
    return list(pairwise(edges))


def split_trajectories(index: Index, split: str, val_fraction: float, name: str) -> NDArray[np.bool_]:
    """Which trajectories belong to `split` (`train` or `val`), bool [K].

    As released, a split called `val` (or tfds's `validation`) is held out; without one, the last part of `train` is.

    Raises:
        ValueError: there is no split called `train`.
    """
    if "train" not in index.splits:
        raise ValueError(
            f"{name}: no split is called 'train'; there are {', '.join(index.splits)}. Training reads `train`: write "
            "the dataset with one, or give the split that name in dataset_info.json"
        )
    if (held_out := validation_split(index)) is not None:
        return index.split == index.splits.index(held_out if split == "val" else split)
    train = np.flatnonzero(index.split == index.splits.index("train"))
    cut = round(len(train) * (1 - val_fraction))
    chosen = np.zeros(index.num_trajectories, bool)
    chosen[train[:cut] if split == "train" else train[cut:]] = True
    return chosen


def validation_split(index: Index) -> str | None:
    """The split that is held out; None if there is no such split and a part of `train` is held out."""
    return next((name for name in VALIDATION if name in index.splits), None)


def unused_splits(index: Index) -> dict[str, int]:
    """Split -> steps, for the splits that are neither trained on nor held out."""
    lengths = np.diff(index.bounds)
    used = ("train", validation_split(index))
    return {name: int(lengths[index.split == i].sum()) for i, name in enumerate(index.splits) if name not in used}


def spoken(index: Index) -> NDArray[np.bool_]:
    """Which of the index's instructions are not empty, bool [W]."""
    return np.array([bool(words.strip()) for words in index.instructions], bool)


def labelled(index: Index) -> NDArray[np.bool_]:
    """Which trajectories have an instruction at any step, bool [K]."""
    has_words = spoken(index)
    has_instruction = np.zeros(index.num_trajectories, bool)
    for first, last in pieces(index):
        has_instruction[index.trajectory[first:last][has_words[index.instruction[first:last]]]] = True
    return has_instruction


def begins(index: Index, spec: DatasetSpec, first: int, last: int, noop_filter: NoopFilter) -> NDArray[np.bool_] | None:
    """Which of the steps first .. last are left out as the first of a trajectory; None: the filter leaves out none."""
    if noop_filter == "none" or not (spec.drop_first or noop_filter == "first_step"):
        return None
    left_out = np.zeros(last - first, bool)
    starts = index.bounds[:-1][np.diff(index.bounds) > 0]
    left_out[starts[(starts >= first) & (starts < last)] - first] = True
    return left_out


def zero_actions(source: Source, first: int, last: int) -> NDArray[np.bool_] | None:
    """Which steps ask for no movement, as released for DROID; None for datasets without that filter.

    The released filter compares normalised actions with a normalised zero, to 1e-5, using quantiles that are written
    into its code. Here the quantiles are the dataset's own.
    """
    if not source.spec.zero_filter:
        return None
    index, statistics = source.index, source.statistics
    changing = ~np.array(source.spec.absolute_mask(index.action.shape[1]))
    of_zero = statistics.normalise(np.zeros(index.action.shape[1], np.float32))
    off = np.abs(statistics.normalise(index.action[first:last]) - of_zero)[:, changing]
    return (off <= 1e-5).all(axis=1)


def noops(index: Index, spec: DatasetSpec, first: int = 0, last: int | None = None) -> NDArray[np.bool_]:
    """Which of the steps first .. last (whole trajectories) stand still; none if the dataset has no threshold.

    A step stands still if it moves less than the threshold and the gripper (its absolute dimensions) is as in the last
    kept step. Until a step has been kept, only the movement counts.
    """
    action, trajectory = index.action[first:last], index.trajectory[first:last]
    if spec.noop_threshold is None or not len(action):
        return np.zeros(len(action), bool)
    absolute = np.array(spec.absolute_mask(action.shape[1]))
    still = np.linalg.norm(action[:, ~absolute], axis=1) < spec.noop_threshold
    # Comparing with the previous step is enough: it was kept, or it was dropped because its gripper equalled the last
    # kept one.
    held = action[:, absolute]
    same = np.append(False, (held[1:] == held[:-1]).all(axis=1))
    steps = np.arange(len(action))
    trajectory_index = trajectory - trajectory[0]
    first_kept = np.full(trajectory_index[-1] + 1, len(action))
    np.minimum.at(first_kept, trajectory_index[~still], steps[~still])
    return still & (same | (steps < first_kept[trajectory_index]))
