"""The order of training, which depends only on the seed and the sample's number.

Sample n is (dataset, position in that dataset's own permutation of the epoch). There is no buffer and no state, so
ranks and workers can take any slice of one global sequence, and resuming needs one integer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.permutation import Ints, Uint, key, permute, scramble, uniform

BLOCK = 8192

Walk = Callable[[Ints, Uint], Ints]
"""Numbers within an epoch and the epoch's key -> positions in the dataset."""


def mixture_weights(weights: Mapping[str, float], sizes: Mapping[str, int], balance: bool = True) -> dict[str, float]:
    """Return each dataset's normalised share of the samples: weight x size as released, or only the weight.

    Raises:
        ValueError: a weight is negative or not a number, all are zero, or a dataset to draw from is empty.
    """
    check_weights(weights)
    if empty := [name for name, weight in weights.items() if weight > 0 and sizes[name] < 1]:
        raise ValueError(f"nothing to train on in {', '.join(empty)}: no step is left after filters and split")
    parts = {name: float(weight) * (sizes[name] if balance else 1) for name, weight in weights.items()}
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError for a mixture from which no sample can be drawn."""
    if bad := [f"{name}: {weight!r}" for name, weight in weights.items() if not _is_weight(weight)]:
        raise ValueError(f"weights of a mixture are finite numbers >= 0; got {', '.join(bad)}")
    if not any(weights.values()):
        raise ValueError("the mixture is empty: give at least one dataset a weight above 0 (data.mix.<dataset>=1.0)")


def _is_weight(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < float("inf")


@dataclass(frozen=True)
class Stage:
    """Part of a curriculum.

    Attributes:
        start: number of its first sample.
        shares: probability of each dataset; they sum to 1.
    """

    start: int
    shares: Sequence[float]


class GlobalOrder:
    """Maps sample numbers to (dataset, position).

    In every block of 8192 samples, each dataset has its share to within one sample, at random places. The rounding is
    random per block, so that shares are exact on average. Each dataset is read in its own permutation, a new one
    per epoch of that dataset, so every step is served once before any step is repeated. A new stage continues each
    dataset where the previous stage stopped.

    Args:
        sizes: steps of each dataset.
        stages: the stages of the curriculum; the first starts at 0.
        seed: seed of the order.
        walks: orders of datasets that are not read in a uniform permutation.
    """

    def __init__(
        self, sizes: Sequence[int], stages: Sequence[Stage], seed: int, walks: Mapping[int, Walk] | None = None
    ) -> None:
        starts = [stage.start for stage in stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"stages must start at 0 and follow each other, got {starts}")
        self.sizes, self.starts = np.maximum(np.asarray(sizes, np.int64), 1), np.array(starts)
        self.seed, self.walks = seed, dict(walks or {})
        self.edges = np.stack([_edges(stage.shares) for stage in stages])
        self.keys = np.array([key(seed, 3, i) for i in range(len(sizes))], np.uint64)
        self._bases: dict[int, tuple[int, Ints]] = {}
        self._first = [np.zeros(len(sizes), np.int64)]
        self._tables: dict[tuple[int, int], tuple[Ints, Ints]] = {}

    def __call__(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Return dataset and position, both int64 [n], of the samples `numbers` [n]."""
        numbers = np.asarray(numbers, np.int64)
        dataset, position = np.empty_like(numbers), np.empty_like(numbers)
        stages = np.searchsorted(self.starts, numbers, side="right") - 1
        within = numbers - self.starts[stages]
        blocks = within // BLOCK
        for stage, block in sorted(set(zip(stages.tolist(), blocks.tolist(), strict=True))):
            here = (stages == stage) & (blocks == block)
            datasets, positions = self._table(stage, block)
            places = within[here] % BLOCK
            dataset[here], position[here] = datasets[places], positions[places]
        return dataset, position

    def served(self, samples: int) -> Ints:
        """How many of the first `samples` samples come from each dataset, int64 [datasets]."""
        stage = int(np.searchsorted(self.starts, samples, side="right")) - 1
        block, rest = divmod(samples - int(self.starts[stage]), BLOCK)
        before = self._before(stage, block)
        return before + np.bincount(self._datasets(stage, block)[:rest], minlength=len(self.sizes))

    def _table(self, stage: int, block: int) -> tuple[Ints, Ints]:
        if (stage, block) not in self._tables:
            datasets = self._datasets(stage, block)
            by_dataset = np.argsort(datasets, kind="stable")
            counts = np.bincount(datasets, minlength=len(self.sizes))
            turns = np.empty(BLOCK, np.int64)
            turns[by_dataset] = np.arange(BLOCK) - np.repeat(np.cumsum(counts) - counts, counts)
            epoch, number = np.divmod(self._before(stage, block)[datasets] + turns, self.sizes[datasets])
            seeds = scramble(self.keys[datasets] ^ epoch.view(np.uint64))
            if len(self._tables) > 3:
                self._tables.clear()
            self._tables[stage, block] = datasets, self._positions(datasets, number, seeds)
        return self._tables[stage, block]

    def _positions(self, datasets: Ints, numbers: Ints, seeds: Uint) -> Ints:
        special = np.isin(datasets, list(self.walks))
        positions = np.empty_like(numbers)
        positions[~special] = permute(numbers[~special], self.sizes[datasets[~special]], seeds[~special])
        for i, walk in self.walks.items():
            here = datasets == i
            positions[here] = walk(numbers[here], seeds[here])
        return positions

    def _datasets(self, stage: int, block: int) -> Ints:
        """The dataset of each sample of a block."""
        counts = self._counts(stage, np.array([block]))[0]
        places = np.argsort(scramble(key(self.seed, 1, stage, block) + np.arange(BLOCK, dtype=np.uint64)))
        return np.repeat(np.arange(len(self.sizes)), counts)[places]

    def _counts(self, stage: int, blocks: Ints) -> Ints:
        rounding = uniform(key(self.seed, 2, stage) + blocks.astype(np.uint64))
        upto = np.floor(BLOCK * self.edges[stage] + rounding[:, None]).astype(np.int64)
        return np.diff(np.clip(upto, 0, BLOCK), axis=1)

    def _before(self, stage: int, block: int) -> Ints:
        """How often each dataset was served before a block."""
        while len(self._first) <= stage:  # positions of the datasets after the previous stages
            last = len(self._first) - 1
            blocks, rest = divmod(int(self.starts[last + 1] - self.starts[last]), BLOCK)
            partial = np.bincount(self._datasets(last, blocks)[:rest], minlength=len(self.sizes))
            self._first.append(self._before(last, blocks) + partial)
        known, base = self._bases.get(stage, (0, self._first[stage]))
        if known > block:
            known, base = 0, self._first[stage]
        for first in range(known, block, 2**16):
            base = base + self._counts(stage, np.arange(first, min(first + 2**16, block))).sum(axis=0)
        self._bases[stage] = (block, base)
        return base


def _edges(shares: Sequence[float]) -> NDArray[np.float64]:
    """The bounds of each dataset's part of a block; rounding never gives samples to a share of 0."""
    edges = np.concatenate([[0.0], np.cumsum(shares)])
    edges[np.flatnonzero(shares)[-1] + 1 :] = 1.0
    edges[edges > 1] = 1.0
    return edges


class WindowedWalk:
    """An order that reads a few shards at a time, for storage that is slow to read at random.

    Shards come in a random order, as many at a time as fit the budget, and the steps of these shards are shuffled
    together. Every step still comes once per epoch, and the order is a function of the epoch's key.

    Args:
        bounds: int64 [F + 1]; shard f holds the images of positions bounds[f] .. bounds[f + 1].
        sizes: int64 [F], bytes of each shard.
        budget: bytes of the shards that are shuffled together; at least one shard is used.
    """

    def __init__(self, bounds: Ints, sizes: Ints, budget: int) -> None:
        self.bounds, self.sizes, self.budget = bounds, sizes, budget
        self._epochs: dict[int, tuple[Ints, Ints, Ints]] = {}

    def __call__(self, numbers: Ints, epochs: Uint) -> Ints:
        """The positions of the numbers [n] in the epochs with the keys [n]."""
        positions = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == np.uint64(epoch))
            shards, ends, windows = self._epoch(epoch)
            first, last = windows[:-1], windows[1:]
            window = np.searchsorted(last, numbers[here], side="right")
            within = numbers[here] - first[window]
            seeds = scramble(np.uint64(epoch) ^ window.astype(np.uint64))
            place = first[window] + permute(within, (last - first)[window], seeds)
            shard = np.searchsorted(ends, place, side="right")
            begins = np.concatenate([[0], ends[:-1]])
            positions[here] = self.bounds[shards[shard]] + place - begins[shard]
        return positions

    def _epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """The shards in order, the end of each shard's steps in that order, and the windows' bounds."""
        if epoch not in self._epochs:
            count = len(self.sizes)
            shards = np.argsort(scramble(np.uint64(epoch) + np.arange(count, dtype=np.uint64)))
            ends = np.cumsum(np.diff(self.bounds)[shards])
            windows, held = [0], 0
            for place, size in enumerate(self.sizes[shards].tolist()):
                if held and held + size > self.budget:
                    windows.append(int(ends[place - 1]))
                    held = 0
                held += size
            bounds = np.unique([*windows, int(ends[-1])])
            self._epochs = {epoch: (shards, ends, bounds)}
        return self._epochs[epoch]


class HeldOutOrder:
    """All steps of all datasets once, in one fixed shuffled order, so that any prefix is a fair sample.

    Args:
        sizes: steps of each dataset.
        seed: seed of the order.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self.ends, self.seed = np.cumsum(sizes), seed

    def __call__(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Return dataset and position, both int64 [n], of the samples `numbers` [n]."""
        place = permute(np.asarray(numbers, np.int64), int(self.ends[-1]), key(self.seed, 5))
        dataset = np.searchsorted(self.ends, place, side="right")
        return dataset, place - np.concatenate([[0], self.ends])[dataset]
