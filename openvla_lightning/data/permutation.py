"""Counter-based random numbers and permutations: they depend only on a key and a counter, and keep no state."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Uint = NDArray[np.uint64]

ROUNDS = 6
SMALLEST_HALF = 4
"""Smallest number of bits in half a Feistel word; smaller words allow too few permutations."""


def scramble(x: Uint) -> Uint:
    """The finaliser of splitmix64: every input bit affects every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # arrays overflow without a warning
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def key(*numbers: int) -> np.uint64:
    """One 64-bit key for a tuple of integers."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = scramble(state ^ np.uint64(number % 2**64))
    return state[0]


def uniform(counters: Uint) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each counter."""
    return (scramble(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(numbers: Ints, size: int | Ints, seeds: np.uint64 | Uint) -> Ints:
    """Apply a pseudo-random permutation of 0 .. size - 1 to `numbers`. There is no table, so any size costs the same.

    It is a Feistel network over the next even power of two, applied again to results outside the range.

    Args:
        numbers: int64 [n].
        size: size of the permuted range; one, or one per number [n].
        seeds: choose the permutation; one, or one per number [n].
    """
    result = numbers.astype(np.uint64)
    limit = np.broadcast_to(np.asarray(size, np.uint64), result.shape)
    seed = np.broadcast_to(np.asarray(seeds, np.uint64), result.shape)
    half = np.maximum(SMALLEST_HALF, (_bits(limit) + 1) // 2).astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        bits, keys = half[outside], seed[outside]
        low = (np.uint64(1) << bits) - np.uint64(1)
        left, right = result[outside] >> bits, result[outside] & low
        for i in range(ROUNDS):
            left, right = right, left ^ (scramble(right ^ (keys + np.uint64(i))) & low)
        result[outside] = (left << bits) | right
        outside = outside[result[outside] >= limit[outside]]
    return result.astype(np.int64)


def _bits(limit: Uint) -> Ints:
    """Bits of the largest number below `limit`; exact for ranges up to 2**53."""
    return np.frexp((limit - np.uint64(1)).astype(np.float64))[1].astype(np.int64)
