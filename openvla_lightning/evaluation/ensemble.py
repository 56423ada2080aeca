"""Averages the chunks of several decisions to one action, which gives smoother motion than the newest chunk alone.

The state is explicit: `step` takes the remembered chunks and returns the new ones. So one object serves many robots,
and a new episode begins with `()`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Chunk = NDArray[np.float64]
"""Actions [T, D]; or one action [D] from a policy without chunks, whose last actions are averaged."""
Memory = tuple[Chunk, ...]
"""Chunks of the last decisions, oldest first."""


class Ensemble(Protocol):
    """Combines overlapping chunks to the action for the present step."""

    def step(self, memory: Memory, chunk: Chunk) -> tuple[Memory, NDArray[np.float64]]:
        """The new memory, and the action [D] for the present step, after the newest chunk [T, D]; one call per step."""


class _Weighted:
    """A weighted mean of the last `horizon` decisions' predictions for the present step; subclasses define weights."""

    horizon: int

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon={self.horizon} remembers nothing; 1 acts on the newest chunk alone")

    def step(self, memory: Memory, chunk: Chunk) -> tuple[Memory, NDArray[np.float64]]:
        """See `Ensemble`.

        Raises:
            ValueError: for a chunk shorter than the horizon.
        """
        memory, predictions = _remember(memory, chunk, self.horizon)
        weights = self._weights(predictions)
        return memory, (weights / weights.sum()) @ predictions

    def _weights(self, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights [n] of the predictions [n, D], oldest first."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdaptiveEnsemble(_Weighted):
    """CogACT's ensemble: older predictions count more if they agree with the newest (arXiv 2411.19650, 3.4).

    Weights are exp(alpha * cosine(older, newest)), over all dimensions including the gripper, on actions in the
    robot's units, as released.

    Args:
        horizon: how many decisions count; released: 7 on WidowX, 2 on the Google robot.
        alpha: influence of the agreement; 0 gives the plain mean.
    """

    horizon: int = 7
    alpha: float = 0.1

    def _weights(self, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
        newest = predictions[-1]
        norms = np.linalg.norm(predictions, axis=1) * np.linalg.norm(newest)
        return np.exp(self.alpha * (predictions @ newest) / (norms + 1e-7))


@dataclass(frozen=True)
class TemporalEnsemble(_Weighted):
    """ACT's ensemble: predictions are averaged with weights exp(-decay * i), i = 0 for the oldest (arXiv 2304.13705).

    Args:
        horizon: how many decisions count.
        decay: ACT's m; above 0, as published, the oldest prediction has the largest weight; below 0, the newest.
    """

    horizon: int = 8
    decay: float = 0.01

    def _weights(self, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-self.decay * np.arange(len(predictions)))


def _remember(memory: Memory, chunk: Chunk, horizon: int) -> tuple[Memory, NDArray[np.float64]]:
    """The last chunks, and their predictions for the present step [n, D]: row k of the chunk from k decisions ago."""
    memory = (*memory, np.asarray(chunk, np.float64))[-horizon:]
    if np.ndim(chunk) == 1:
        return memory, np.stack(memory)
    ages: Sequence[int] = range(len(memory) - 1, -1, -1)
    if short := [len(old) for old, age in zip(memory, ages, strict=True) if age >= len(old)]:
        raise ValueError(
            f"an ensemble over {horizon} decisions needs chunks of as many actions, and these have {short[0]}; "
            f"give horizon={short[0]} at most"
        )
    return memory, np.stack([old[age] for old, age in zip(memory, ages, strict=True)])
