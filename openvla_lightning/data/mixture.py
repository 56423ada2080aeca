"""The order of training: a function of the seed and the sample's number, nothing else.

Sample n is (dataset, position in that dataset's own permutation of the epoch). Nothing is buffered and nothing is
remembered, so ranks and workers take any slice of one global sequence, and resuming needs one integer.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Uint = NDArray[np.uint64]
BLOCK = 8192
ROUNDS = 6
SMALLEST_HALF = 4
"""Bits in half a Feistel word: smaller words permute too few ways."""


def mixture_weights(weights: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return each dataset's share of the samples: weight x size, normalised, as released.

    Datasets of weight 0 are left out.

    Raises:
        ValueError: a weight is negative or not a number, all are zero, or a dataset is empty.
    """
    check_weights(weights)
    used = {name: float(weight) for name, weight in weights.items() if weight > 0}
    if empty := [name for name in used if sizes[name] < 1]:
        raise ValueError(f"nothing to train on in {', '.join(empty)}: no step is left after filters and split")
    total = sum(weight * sizes[name] for name, weight in used.items())
    return {name: weight * sizes[name] / total for name, weight in used.items()}


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError for a mixture from which nothing can be drawn."""
    if bad := [f"{name}: {weight!r}" for name, weight in weights.items() if not _is_weight(weight)]:
        raise ValueError(f"weights of a mixture are finite numbers >= 0; got {', '.join(bad)}")
    if not any(weights.values()):
        raise ValueError("the mixture is empty: give at least one dataset a weight above 0 (data.mix.<dataset>=1.0)")


def _is_weight(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < float("inf")


class GlobalOrder:
    """Maps sample numbers to (dataset, position).

    In every block of 8192 samples each dataset has its share to within one sample, at random places; the rounding is
    drawn per block so that shares are exact on average. Each dataset is walked through its own permutation, a new one
    per epoch of that dataset, so every step is served once before any comes again.

    Args:
        sizes: steps of each dataset.
        shares: probability of each dataset; they sum to 1.
        seed: another seed, another order.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        self.edges = np.append(np.cumsum(shares)[:-1], 1.0)
        self.edges = np.concatenate([[0.0], self.edges])
        self._base = (0, np.zeros(len(sizes), np.int64))
        self._tables: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __call__(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return dataset and position, both int64 [n], of the samples `numbers` [n]."""
        numbers = np.asarray(numbers, np.int64)
        dataset, position = np.empty_like(numbers), np.empty_like(numbers)
        blocks = numbers // BLOCK
        for block in np.unique(blocks).tolist():
            here = blocks == block
            datasets, positions = self._table(block)
            dataset[here], position[here] = datasets[numbers[here] % BLOCK], positions[numbers[here] % BLOCK]
        return dataset, position

    def _table(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if block not in self._tables:
            counts = self._counts(np.array([block]))[0]
            base = self._served_before(block)
            places = np.argsort(mix(key(self.seed, 1, block) + np.arange(BLOCK, dtype=np.uint64)))
            datasets = np.repeat(np.arange(len(self.sizes)), counts)[places]
            positions = np.empty(BLOCK, np.int64)
            for i, size in enumerate(self.sizes):
                positions[datasets == i] = self._permuted(i, base[i] + np.arange(counts[i]), size)
            if len(self._tables) > 3:
                self._tables.clear()
            self._tables[block] = datasets, positions
        return self._tables[block]

    def _counts(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        rounding = uniform(key(self.seed, 2) + blocks.astype(np.uint64))
        upto = np.floor(BLOCK * self.edges + rounding[:, None]).astype(np.int64)
        upto[:, 0], upto[:, -1] = 0, BLOCK
        return np.diff(upto, axis=1)

    def _served_before(self, block: int) -> NDArray[np.int64]:
        known, base = self._base if self._base[0] <= block else (0, np.zeros(len(self.sizes), np.int64))
        for first in range(known, block, 2**16):
            base = base + self._counts(np.arange(first, min(first + 2**16, block))).sum(axis=0)
        self._base = (block, base)
        return base

    def _permuted(self, dataset: int, served: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        epoch, position = np.divmod(served, size)
        if len(epoch) and epoch[0] == epoch[-1]:
            epoch = epoch[:1]
        return permute(position, size, mix(key(self.seed, 3, dataset) ^ epoch.astype(np.uint64)))


class HeldOutOrder:
    """All steps of all datasets once, in one fixed shuffled order, so that any prefix is a fair sample.

    Args:
        sizes: steps of each dataset.
        seed: another seed, another order.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self.ends, self.seed = np.cumsum(sizes), seed

    def __call__(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return dataset and position, both int64 [n], of the samples `numbers` [n]."""
        place = permute(np.asarray(numbers, np.int64), int(self.ends[-1]), np.array([key(self.seed, 5)]))
        dataset = np.searchsorted(self.ends, place, side="right")
        return dataset, place - np.concatenate([[0], self.ends])[dataset]


def permute(numbers: NDArray[np.int64], size: int, seeds: Uint) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of 0 .. size - 1 sends `numbers`; no table, so any size costs the same.

    A Feistel network over the next even power of two, applied again to what falls outside.

    Args:
        numbers: int64 [n].
        size: of the permuted range.
        seeds: uint64 [1], or one per number [n].
    """
    half = np.uint64(max(SMALLEST_HALF, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = numbers.astype(np.uint64)
    keys = mix(np.arange(ROUNDS, dtype=np.uint64)[:, None] + seeds)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & low
        for round_keys in keys:
            own = round_keys if len(round_keys) == 1 else round_keys[outside]
            left, right = right, left ^ (mix(right ^ own) & low)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def mix(x: Uint) -> Uint:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key(*numbers: int) -> np.uint64:
    """One 64-bit key for a tuple of integers."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state ^ np.uint64(number % 2**64))
    return state[0]


def uniform(counters: Uint) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each counter."""
    return (mix(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
