"""Which samples a process takes, and the DataModule that does not lose its place."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from openvla_lightning.data.source.processes import end_with_parent
from openvla_lightning.data.source.rlds.array_records import start_method
from openvla_lightning.runtime.cores import available_cores
from openvla_lightning.statistics import Normalisation


class SampleError(ValueError):
    """A sample cannot be served; the message says which: dataset, trajectory, step, file."""

    def __init__(self, message: str) -> None:
        # from a worker process, torch sends the traceback along in the message
        super().__init__(message.rpartition("SampleError: ")[2].strip())


class Collate:
    """Collates samples and, where that fails, says which one it fails for.

    Args:
        collate: what a list of samples becomes a batch by.
        where: number of a sample -> where it lies, in words.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], where: Callable[[int], str]) -> None:
        self.collate, self.where = collate, where

    def __call__(self, samples: list[Any]) -> Any:
        try:
            return self.collate(samples)
        except (ValueError, KeyError, TypeError):
            for sample in samples:
                try:
                    self.collate([sample])
                except (ValueError, KeyError, TypeError) as error:
                    raise SampleError(f"{self.where(sample.number)}: {error}") from error
            raise  # each by itself can be collated


class Loader(DataLoader[Any]):
    """Tells Lightning that it may resume inside an epoch; the place itself is in the DataModule's state."""

    def __iter__(self) -> Any:
        """Start the workers in a way that survives what was read in this process before."""
        if self.num_workers and sys.platform == "linux":  # not what joblib, of a sweep over GPUs, made the default
            self.multiprocessing_context = start_method()
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: workers run ahead, so a loader does not know what was used."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class BatchNumbers(DistributedSampler[Any], SequentialSampler):
    """Yields the sample numbers of this process' part of every batch.

    The base classes only satisfy Lightning's isinstance checks, so that it does not replace this sampler on several
    devices or under `overfit_batches`. Nothing is inherited.

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
        if not self.batches:
            return  # nothing is held out
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


class ResumableDataModule(L.LightningDataModule):
    """Serves numbered samples: each process its part of every batch, from the sample where the last checkpoint stopped.

    What training asks of a DataModule, whichever it is, are the attributes below and `where` and `served`.

    Args:
        collate: what a list of samples becomes a batch by.
        global_batch_size: samples in one optimiser step, over all devices and accumulated batches.
        num_workers: loader processes per device; None: one for every two cores, at most 8, none on two cores.

    Attributes:
        samples_served: how many training was given, over all devices.
        training_collate: `collate`, or what takes its place in training.
        statistics: dataset name -> `DatasetStatistics`, which every checkpoint carries; empty where nothing acts.
        normalisation: how actions were normalised by them.
        crop_area: share of the picture that training crops to; acting looks at as much in the middle. None: all of it.
    """

    statistics: Mapping[str, Any] = MappingProxyType({})
    normalisation: Normalisation = "quantile"
    crop_area: float | None = None

    def __init__(self, collate: Callable[[list[Any]], Any], global_batch_size: int, num_workers: int | None) -> None:
        super().__init__()
        if global_batch_size < 1:
            raise ValueError(f"data.global_batch_size={global_batch_size}: must be at least 1")
        self.collate, self.global_batch_size = collate, global_batch_size
        self.training_collate = collate
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.samples_served = 0

    def where(self, number: int) -> str:
        """Which sample of which dataset has this number, for error messages."""
        raise NotImplementedError

    def served(self) -> dict[str, tuple[int, float]]:
        """Of each dataset, how many samples training was given so far, and how many the weights call for."""
        raise NotImplementedError

    @property
    def proprio_dim(self) -> int | None:
        """Width of the proprioception that is served; None: none is."""
        return None

    @property
    def batch_size(self) -> int:
        """Samples in one batch over all devices; `accumulate_grad_batches` of them make an optimiser step.

        Raises:
            ValueError: when devices and accumulation cannot share the global batch.
        """
        world, accumulated = self._world()[0], self._accumulated()
        if self.global_batch_size % (world * accumulated):
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} cannot be shared by {world} devices with "
                f"accumulate_grad_batches={accumulated}: it must be a multiple of {world * accumulated}"
            )
        return self.global_batch_size // accumulated

    def training_loader(self, batches: Any, epoch_samples: int) -> DataLoader[Any]:
        """Reads `batches[numbers]`, going on after the samples served."""
        numbers = BatchNumbers(lambda: self.samples_served, self.batch_size, epoch_samples, *self._world())
        return self._loader(batches, numbers, self.training_collate)

    def held_out_loader(self, batches: Any, samples: int) -> DataLoader[Any]:
        """Reads `batches[numbers]` of the numbers below `samples`, always the same."""
        size = max(self._world()[0], self.global_batch_size // self._accumulated())
        return self._loader(batches, BatchNumbers(lambda: 0, size, samples, *self._world(), whole=True), self.collate)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count what training was given; loaders run ahead, so they cannot know.

        With `overfit_batches` nothing counts, as it is the same samples again and again.
        """
        overfit = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        if self.trainer is not None and self.trainer.training and not overfit:
            self.samples_served += self.global_batch_size // self._accumulated()
        return batch

    def _loader(self, batches: Any, numbers: BatchNumbers, collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        parallel: dict[str, Any] = {}
        if self.num_workers:
            parallel = {"num_workers": self.num_workers, "persistent_workers": True, "prefetch_factor": 4}
            parallel["worker_init_fn"] = end_with_parent
        collated = Collate(collate, batches.where)
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return Loader(batches, batch_size=None, sampler=numbers, collate_fn=collated, pin_memory=pinned, **parallel)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1


def default_workers() -> int:
    """One worker for every two cores of a device, at most 8; none where there are only two."""
    cores = available_cores()
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cores // devices // 2) if cores // devices > 2 else 0
