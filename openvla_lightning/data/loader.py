"""The sampler of a process, and a DataModule that can resume at any sample."""

import atexit
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from openvla_lightning.data.source.processes import begin_loading
from openvla_lightning.data.source.rlds.array_records import start_method
from openvla_lightning.runtime.cores import available_cores
from openvla_lightning.statistics import Normalisation


class SampleError(ValueError):
    """A sample cannot be served; the message names dataset, trajectory, step and file."""

    def __init__(self, message: str) -> None:
        # torch puts the traceback of a worker process into the message
        super().__init__(message.rpartition("SampleError: ")[2].strip())


class Collate:
    """Collates samples; if that fails, the error names the sample at fault.

    Args:
        collate: function that makes a batch of a list of samples.
        where: number of a sample -> its place, in words.
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
            raise  # each sample alone can be collated


class Loader(DataLoader[Any]):
    """Tells Lightning that it can resume inside an epoch; the DataModule's state holds the position."""

    def __iter__(self) -> Any:
        """Start the workers with a method that is safe after this process has read data itself."""
        if not self.num_workers:
            return super().__iter__()
        if sys.platform == "linux":  # overrides joblib's default in a sweep over GPUs
            self.multiprocessing_context = start_method()
        iterator: Any = super().__iter__()
        _with_workers.add(iterator)
        for worker in iterator._workers:  # SIGTERM, with which torch ends one that does not answer, they ignore
            worker._popen.terminate = worker._popen.kill
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Nothing: workers prefetch, so a loader does not know which samples were used."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


_with_workers: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Iterators of loaders whose workers may still run."""


@atexit.register  # after torch's own function, so called before it
def _end_workers() -> None:
    """End the workers of iterators that an error has kept alive, in validation for example.

    Python would send them SIGTERM, which they ignore (see `begin_loading`), and wait for them for ever.
    """
    for iterator in list(_with_workers):
        iterator._shutdown_workers()


class BatchNumbers(DistributedSampler[Any], SequentialSampler):
    """Yields the sample numbers of this process' part of every batch.

    The base classes only satisfy Lightning's isinstance checks, so that it does not replace this sampler on several
    devices or under `overfit_batches`. Nothing is inherited.

    Args:
        start: returns the first sample of a pass; called when the pass begins.
        batch_size: samples in a batch, over all processes.
        samples: samples in an epoch.
        world: number of processes.
        rank: number of this process.
        whole: serve all samples, with a smaller last batch; False: drop the incomplete last batch.
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
        """Nothing: the order of the samples already depends on the epoch."""


class ResumableDataModule(L.LightningDataModule):
    """Serves numbered samples to each process, starting at the sample where the last checkpoint stopped.

    Training needs the attributes below, `where` and `served` from every DataModule.

    Args:
        collate: function that makes a batch of a list of samples.
        global_batch_size: samples in one optimiser step, over all devices and accumulated batches.
        num_workers: loader processes per device; None: one for every two cores, at most 8, none on two cores.

    Attributes:
        samples_served: how many samples were served to training, over all devices.
        training_collate: `collate`, or its replacement in training.
        statistics: dataset name -> `DatasetStatistics`, saved in every checkpoint; empty for data without actions.
        normalisation: how actions are normalised with them.
        crop_area: share of an image's area that training crops; acting uses a centre crop of it. None: no crop.
    """

    statistics: Mapping[str, Any] = MappingProxyType({})
    normalisation: Normalisation = "quantile"
    crop_area: float | None = None

    def __init__(self, collate: Callable[[list[Any]], Any], global_batch_size: int, num_workers: int | None) -> None:
        super().__init__()
        if global_batch_size < 1:
            raise ValueError(f"data.global_batch_size={global_batch_size}: must be at least 1")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers}: must be at least 0, or null to choose by the cores")
        self.collate, self.global_batch_size = collate, global_batch_size
        self.training_collate = collate
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.samples_served = 0

    def where(self, number: int) -> str:
        """The dataset and place of the sample with this number, for error messages."""
        raise NotImplementedError

    def served(self) -> dict[str, tuple[int, float]]:
        """For each dataset, how many samples were served to training so far, and how many the weights intend."""
        raise NotImplementedError

    @property
    def proprio_dim(self) -> int | None:
        """Width of the served proprioception; None: none is served."""
        return None

    @property
    def batch_size(self) -> int:
        """Samples in one batch over all devices; `accumulate_grad_batches` of them make an optimiser step.

        Raises:
            ValueError: the global batch does not divide by devices and accumulation.
        """
        world, accumulated = self._world()[0], self._accumulated()
        if self.global_batch_size % (world * accumulated):
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} cannot be shared by {world} devices with "
                f"accumulate_grad_batches={accumulated}: it must be a multiple of {world * accumulated}"
            )
        return self.global_batch_size // accumulated

    def training_loader(self, batches: Any, epoch_samples: int) -> DataLoader[Any]:
        """A loader of `batches[numbers]` that continues after the samples that were served."""
        numbers = BatchNumbers(lambda: self.samples_served, self.batch_size, epoch_samples, *self._world())
        return self._loader(batches, numbers, self.training_collate)

    def held_out_loader(self, batches: Any, samples: int) -> DataLoader[Any]:
        """A loader of `batches[numbers]` over the numbers below `samples`, the same in every pass."""
        size = max(self._world()[0], self.global_batch_size // self._accumulated())
        return self._loader(batches, BatchNumbers(lambda: 0, size, samples, *self._world(), whole=True), self.collate)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the samples that training receives; loaders prefetch, so they cannot count them.

        With `overfit_batches`, samples are not counted, because they are always the same.
        """
        overfit = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        if self.trainer is not None and self.trainer.training and not overfit:
            self.samples_served += self.global_batch_size // self._accumulated()
        return batch

    def _loader(self, batches: Any, numbers: BatchNumbers, collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        parallel: dict[str, Any] = {}
        if self.num_workers:
            parallel = {"num_workers": self.num_workers, "persistent_workers": True, "prefetch_factor": 4}
            parallel["worker_init_fn"] = begin_loading
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
