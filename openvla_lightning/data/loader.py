"""Which samples a process takes, and the loader that does not lose its place."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler


class Loader(DataLoader[Any]):
    """Tells Lightning that it may resume inside an epoch; the place itself is in the DataModule's state."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: workers run ahead, so a loader does not know what was used."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class BatchNumbers(DistributedSampler[Any], SequentialSampler):
    """Yields the sample numbers of this process' part of every batch.

    It is both of its bases by name only, so that Lightning replaces it neither on several devices, as it shares out the
    samples itself, nor for `overfit_batches`, as it then starts at the same place every time.

    Args:
        start: the first sample of the next pass, asked when it begins.
        batch_size: samples in a batch, over all processes.
        samples: samples in an epoch.
        world: number of processes.
        rank: which of them this is.
        whole: end with a smaller batch rather than with the last full one.
    """

    def __init__(
        self, start: Callable[[], int], batch_size: int, samples: int, world: int, rank: int, whole: bool = False
    ) -> None:
        self.start, self.batch_size, self.world, self.rank = start, batch_size, world, rank
        self.total = samples - samples % world if whole else None
        self.batches = -(-(self.total or 0) // batch_size) if whole else max(1, samples // batch_size)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        first = self.start()
        done = first // self.batch_size % self.batches
        for batch in range(self.batches - done):
            low = first + batch * self.batch_size
            high = low + self.batch_size if self.total is None else min(low + self.batch_size, self.total)
            yield list(range(low + self.rank, high, self.world))

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the order knows its epochs."""


def default_workers() -> int:
    """One worker for every two cores of a device, at most 8; none where there are only two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cores // devices // 2) if cores // devices > 2 else 0
