"""Continuous actions <-> bins <-> the last token ids of a vocabulary (paper section 3.2, RT-2's recipe)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

END_EFFECTOR = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


class ActionTokenizer:
    """Maps each normalised action dimension to one of the last `bins` token ids, as released in openvla-7b.

    `bins` edges are spread evenly over [-1, 1], which makes `bins - 1` bins; an id is `vocab_size` minus the index
    of the edge above the action. So ids fall as actions grow: with the released numbers, 31999 stands for -1 and below,
    and 31744 for +1 and above. Edges are float64, and float32 actions are compared as float64: float32
    edges would give other ids.

    Args:
        vocab_size: ids in the tokenizer's own vocabulary, without padding; action ids end just below it.
        bins: number of edges, which is also the number of ids reserved for actions.
    """

    def __init__(self, vocab_size: int = 32000, bins: int = 256) -> None:
        if not 2 <= bins <= vocab_size:
            raise ValueError(f"bins must lie between 2 and vocab_size={vocab_size}, got {bins}")
        self.vocab_size, self.num_bins = vocab_size, bins
        self.bins: NDArray[np.float64] = np.linspace(-1.0, 1.0, bins)
        self.bin_centers: NDArray[np.float64] = (self.bins[:-1] + self.bins[1:]) / 2.0

    @property
    def first_id(self) -> int:
        """Smallest id that encodes an action (31744 as released)."""
        return self.vocab_size - self.num_bins

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Return the ids of normalised `actions`, in the same shape; values outside [-1, 1] take the outermost ids."""
        clipped = np.clip(np.asarray(actions, dtype=np.float64), -1.0, 1.0)
        return self.vocab_size - np.digitize(clipped, self.bins).astype(np.int64)

    def decode(self, ids: ArrayLike) -> NDArray[np.float64]:
        """Return the bin centres of `ids`, in the same shape; ids outside the action range give the outermost ones."""
        index = self.vocab_size - np.asarray(ids, dtype=np.int64) - 1
        return self.bin_centers[np.clip(index, 0, len(self.bin_centers) - 1)]


def dimension_names(dim: int) -> tuple[str, ...]:
    """Names of an action's dimensions: words for an end effector, numbers for any other action."""
    return END_EFFECTOR if dim == len(END_EFFECTOR) else tuple(map(str, range(dim)))


NO_STATE = "these actions are relative to the robot's state: an observation needs its proprio"


def absolute(
    actions: NDArray[np.float64], relative_to: NDArray[np.int64] | None, proprio: ArrayLike | None
) -> NDArray[np.float64]:
    """Actions [..., D] as the robot takes them, given its state [P] when the chunk begins, both in the dataset's units.

    Args:
        actions: as predicted.
        relative_to: `DatasetStatistics.relative_to`: index of the state that each dimension is a difference from; None:
            all actions are absolute.
        proprio: the state.

    Raises:
        ValueError: actions are relative to the state, but `proprio` is None.
    """
    return actions if relative_to is None else actions + _state(relative_to, proprio)


def differences(
    actions: NDArray[np.float64], relative_to: NDArray[np.int64] | None, proprio: ArrayLike | None
) -> NDArray[np.float64]:
    """Actions [..., D] as a model predicts them: the inverse of `absolute`, with the same arguments and errors."""
    return actions if relative_to is None else actions - _state(relative_to, proprio)


def _state(relative_to: NDArray[np.int64], proprio: ArrayLike | None) -> NDArray[np.float64]:
    if proprio is None:
        raise ValueError(NO_STATE)
    return np.where(relative_to >= 0, np.asarray(proprio, np.float64)[relative_to], 0.0)
