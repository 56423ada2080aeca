"""One action out of the chunks of several decisions: smoother motion than executing the newest chunk alone.

States are explicit: `step` takes the chunks remembered so far and returns those to remember, so that one object serves
many robots, and a new episode begins with `()`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Chunk = NDArray[np.float64]
"""Actions [T, D]; or one action [D], from a policy without chunks, whose earlier actions are averaged as they are."""
Memory = tuple[Chunk, ...]
"""Chunks of the last decisions, oldest first."""


class Ensemble(Protocol):
    """How chunks that overlap become the action for now."""

    def step(self, memory: Memory, chunk: Chunk) -> tuple[Memory, NDArray[np.float64]]:
        """What to remember, and the action [D] for now, after the newest chunk [T, D]; one decision per step."""


class _Weighted:
    """The mean of what the last `horizon` decisions said about now, each by the weight that a subclass gives it."""

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
        """How much each of the predictions [n, D], oldest first, counts: [n]."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdaptiveEnsemble(_Weighted):
    """CogACT's: older predictions for now count more, the more they agree with the newest (arXiv 2411.19650, 3.4).

    Weights are exp(alpha * cosine(older, newest)), over all dimensions, the gripper among them, on actions in the
    robot's units, as released.

    Args:
        horizon: how many decisions count; released: 7 on WidowX, 2 on the Google robot.
        alpha: how much agreement counts; 0 is the plain mean.
    """

    horizon: int = 7
    alpha: float = 0.1

    def _weights(self, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
        newest = predictions[-1]
        norms = np.linalg.norm(predictions, axis=1) * np.linalg.norm(newest)
        return np.exp(self.alpha * (predictions @ newest) / (norms + 1e-7))


@dataclass(frozen=True)
class TemporalEnsemble(_Weighted):
    """ACT's: predictions for now are averaged with weights exp(-decay * age), the oldest first (arXiv 2304.13705).

    Args:
        horizon: how many decisions count.
        decay: ACT's m; above 0, as published, the oldest prediction weighs most; below 0 the newest.
    """

    horizon: int = 8
    decay: float = 0.01

    def _weights(self, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-self.decay * np.arange(len(predictions)))


def _remember(memory: Memory, chunk: Chunk, horizon: int) -> tuple[Memory, NDArray[np.float64]]:
    """The last chunks, and what each says about now [n, D]: a chunk of k decisions ago says it in its row k."""
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
