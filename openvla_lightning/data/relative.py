"""Actions as differences from the state at the start of their chunk, for robots that record positions.

All actions of a chunk are relative to the state at its first step, as in openpi's `DeltaActions`; grippers stay as
recorded. The statistics are those of these differences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.steps import DatasetSteps
from openvla_lightning.statistics import DatasetStatistics

AT_ONCE = 2**15


def state_columns(spec: DatasetSpec, dim: int, states: int) -> NDArray[np.int64] | None:
    """Index of the state that each action dimension is relative to, int64 [dim], or -1. None: all are as recorded.

    Args:
        spec: of the dataset; `relative` True makes every dimension but the grippers relative to the state of the
            same index.
        dim: D, dimensions of an action.
        states: P, dimensions of the proprioception.

    Raises:
        ValueError: there are no such states, or the number of entries is wrong.
    """
    if spec.relative is False:
        return None
    if None in spec.state:
        raise ValueError(f"{spec.name}: actions=delta_from_state needs a `state` without blanks (null)")
    if spec.relative is True:
        grippers = spec.grippers(dim)
        columns: Sequence[int | None] = [None if i in grippers else i for i in range(dim)]
    else:
        columns = spec.relative
    if len(columns) != dim:
        raise ValueError(f"{spec.name}: `relative_to` has {len(columns)} entries, its actions have {dim} dimensions")
    indices = np.array([-1 if column is None else column for column in columns], np.int64)
    if indices.max() >= states or indices.min() < -1:
        raise ValueError(
            f"{spec.name}: actions=delta_from_state needs state {indices.max()}, and `state` holds {states} numbers. "
            "Name the states in `state`, and with `relative_to` which of them each action dimension is relative to"
        )
    return indices


def measure(source: Source, steps: NDArray[np.int32] | None, action_chunk: int) -> DatasetStatistics:
    """The statistics that scale a dataset's actions; if these are relative to the state, those of the differences.

    Args:
        source: the dataset.
        steps: steps of its index to measure; None: all, as released.
        action_chunk: T; differences past the end of a trajectory are not measured.
    """
    index, spec = source.index, source.spec
    measured = source.statistics if steps is None else source.measure(steps)
    columns = state_columns(spec, measured.action_dim, index.proprio.shape[1])
    if columns is None:
        return measured
    every = np.arange(index.num_steps, dtype=np.int32) if steps is None else steps
    chunks = DatasetSteps(source, every, measured, "quantile", action_chunk)
    differences = np.concatenate([*_differences(chunks, columns)])
    mask = spec.action_mask(measured.action_dim)
    action = DatasetStatistics.from_array(differences, mask=mask).action | {"relative_to": columns}
    return replace(measured, action=action)


def _differences(steps: DatasetSteps, columns: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    for first in range(0, len(steps), AT_ONCE):
        positions = np.arange(first, min(first + AT_ONCE, len(steps)))
        actions, beyond = steps.recorded(positions, columns)
        yield actions[~beyond]
