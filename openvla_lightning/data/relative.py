"""Actions said as changes from where the robot is when a chunk of them begins, for robots that record positions.

The first action of a chunk, and every later one of the same chunk, is relative to the state at its first step, as in
openpi's `DeltaActions`; grippers stay as recorded. The statistics are those of these differences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.oxe.registry import DatasetSpec
from openvla_lightning.statistics import DatasetStatistics

if TYPE_CHECKING:
    from openvla_lightning.data.steps import DatasetSteps

AT_ONCE = 2**15


def state_columns(spec: DatasetSpec, dim: int, states: int) -> NDArray[np.int64] | None:
    """Which state each action dimension is relative to, int64 [dim]; -1 for none. None where all are as recorded.

    Args:
        spec: of the dataset; `relative` True stands for every dimension but the grippers, each to the state of the
            same number.
        dim: D, dimensions of an action.
        states: P, dimensions of the proprioception.

    Raises:
        ValueError: there are no such states, or as many entries as there should be.
    """
    if spec.relative is False:
        return None
    if spec.relative is True:
        grippers = spec.grippers(dim)
        columns: Sequence[int | None] = [None if i in grippers else i for i in range(dim)]
    else:
        columns = spec.relative
    if len(columns) != dim:
        raise ValueError(f"{spec.name}: `relative_to` has {len(columns)} entries, its actions have {dim} dimensions")
    found = np.array([-1 if column is None else column for column in columns], np.int64)
    if found.max() >= states or found.min() < -1:
        raise ValueError(
            f"{spec.name}: actions=delta_from_state needs state {found.max()}, and `state` holds {states} numbers. "
            "Name the states in `state`, and with `relative_to` which of them each action dimension is relative to"
        )
    return found


def measure_relative(steps: "DatasetSteps", columns: NDArray[np.int64]) -> DatasetStatistics:
    """Statistics of the differences in all chunks that begin at `steps`, without those past the end of a trajectory."""
    index, spec = steps.source.index, steps.source.spec
    differences = np.concatenate([*_differences(steps, columns)])
    measured = DatasetStatistics.from_array(
        differences,
        index.proprio[steps.steps],
        mask=spec.action_mask(differences.shape[1]),
        num_trajectories=len(np.unique(index.trajectory[steps.steps])),
    )
    action = measured.action | {"relative_to": columns}
    return replace(measured, action=action, num_transitions=len(steps))


def _differences(steps: "DatasetSteps", columns: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    for first in range(0, len(steps), AT_ONCE):
        positions = np.arange(first, min(first + AT_ONCE, len(steps)))
        actions, beyond = steps.recorded(positions, columns)
        yield actions[~beyond]
