"""The DataModule: datasets in, batches out."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from openvla_lightning.data.augment import Augmentation
from openvla_lightning.data.mixture import GlobalOrder, HeldOutOrder, check_weights, mixture_weights
from openvla_lightning.data.oxe.registry import check_names, describe
from openvla_lightning.data.source import Source, SourceFactory
from openvla_lightning.data.steps import DatasetSteps, FilterReport, StepBatches, select
from openvla_lightning.statistics import DatasetStatistics, Normalisation
from openvla_lightning.types import Step

log = logging.getLogger(__name__)


class MissingDataError(FileNotFoundError):
    """Datasets of the mixture are not on disk."""


class VLADataModule(L.LightningDataModule):
    """Serves a weighted mixture of robot datasets as batches.

    The order is a function of the seed and the number of the sample: it depends on neither workers nor devices, and a
    checkpoint resumes at the very next sample, also in the middle of an epoch or on another number of devices.

    Args:
        source: builds the source of one dataset when called with `name` and `spec`.
        mix: dataset -> weight; a dataset's share of the samples is proportional to weight x number of steps.
        collate: list of `Step`s -> batch; `Processor.collate`.
        image_size: images are resized (Lanczos-3, aspect ratio not kept) to this many pixels squared, if they differ.
        global_batch_size: samples in one optimiser step, over all devices and accumulated batches.
        normalisation: `quantile` (q01..q99 to -1..1), `minmax` or `meanstd`.
        filter_noops: leave out steps at which the robot stands still, in datasets that say what that means.
        action_chunk: actions per step.
        val_fraction: share of the trajectories to hold out in datasets without a split `val`.
        augment: operations of `Augmentation` for training images; None: no augmentation.
        cameras: roles to load; the first is what the policy looks through.
        datasets: the user's own datasets, name -> options of `oxe.describe`.
        seed: of order and augmentation.
        num_workers: loader processes per device; None: one for every two cores, at most 8, none on two cores.
        limit_val_samples: at most this many held-out steps, over all datasets; None: all.

    Attributes:
        crop_area: share of an image's area that training looks at, for acting to look at the middle; None: all of it.

    Raises:
        ValueError: an argument makes no sense, a dataset is unknown (the message lists the known ones).
    """

    def __init__(
        self,
        source: SourceFactory,
        mix: Mapping[str, float],
        collate: Callable[[list[Step]], Any],
        image_size: int,
        global_batch_size: int,
        normalisation: Normalisation = "quantile",
        filter_noops: bool = True,
        action_chunk: int = 1,
        val_fraction: float = 0.05,
        augment: Mapping[str, Any] | None = None,
        cameras: Sequence[str] = ("primary",),
        datasets: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 7,
        num_workers: int | None = None,
        limit_val_samples: int | None = None,
    ) -> None:
        super().__init__()
        check_weights(mix)
        check_names(mix, datasets or {})
        if normalisation not in get_args(Normalisation):
            raise ValueError(f"data.normalisation={normalisation}: choose {', '.join(get_args(Normalisation))}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: a share of the trajectories, 0 <= val_fraction < 1")
        for name, number in {"image_size": image_size, "global_batch_size": global_batch_size}.items():
            if number < 1:
                raise ValueError(f"data.{name}={number}: must be at least 1")
        if action_chunk < 1:
            raise ValueError(f"data.action_chunk={action_chunk}: at least the action of the step itself, 1")
        self.mix = {name: float(weight) for name, weight in mix.items() if weight > 0}
        self.collate, self.image_size, self.global_batch_size = collate, image_size, global_batch_size
        self.normalisation, self.filter_noops, self.action_chunk = normalisation, filter_noops, action_chunk
        self.val_fraction, self.cameras, self.seed = val_fraction, tuple(cameras), seed
        self.limit_val_samples = limit_val_samples
        options = dict(augment or {})
        shared_draw = bool(options.pop("shared_draw", False))
        self.augmentation = Augmentation(options, shared_draw) if options else None
        scales = options.get("random_resized_crop", {}).get("scale")
        self.crop_area: float | None = sum(scales) / len(scales) if scales else None
        self.num_workers = _default_workers() if num_workers is None else num_workers
        own = {name: describe(name, options) for name, options in (datasets or {}).items()}
        self.sources: dict[str, Source] = {name: source(name=name, spec=own.get(name)) for name in self.mix}
        self.samples_served = 0
        self.filter_report: dict[str, FilterReport] = {}

    def missing(self) -> list[str]:
        """Names of the mixture's datasets that are not on disk."""
        return [name for name, source in self.sources.items() if source.missing()]

    def check(self) -> None:
        """Find out in milliseconds whether training could start.

        Raises:
            MissingDataError: naming every dataset that is not there and where to get it.
            ValueError: a dataset has no such camera.
        """
        if problems := [problem for source in self.sources.values() if (problem := source.missing())]:
            raise MissingDataError(
                "\n    ".join(
                    [
                        f"{len(problems)} of the mixture's {len(self.sources)} datasets are not there. Point "
                        "paths.data_dir=... or OPENVLA_LIGHTNING_DATA to where they are, or get them:",
                        *problems,
                    ]
                )
            )
        for name, source in self.sources.items():
            if absent := [role for role in self.cameras if role not in source.spec.cameras]:
                raise ValueError(f"{name} has no camera {', '.join(absent)}; it has {', '.join(source.spec.cameras)}")

    def prepare_data(self) -> None:
        """Index the datasets and measure their statistics, unless that was done before."""
        self.check()
        for source in self.sources.values():
            source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the indexed datasets, split and filter them."""
        if self.filter_report:
            return
        self.check()
        dims = {name: source.statistics.action_dim for name, source in self.sources.items()}
        if len(set(dims.values())) > 1:
            raise ValueError(f"one model cannot learn actions of different dimensions: {dims}")
        self.train, self.val = self._steps("train"), self._steps("val")
        sizes = {name: source.statistics.num_transitions for name, source in self.sources.items()}
        if empty := [name for name, steps in self.train.items() if not len(steps)]:
            raise ValueError(f"nothing to train on in {', '.join(empty)}: no step is left after filters and split")
        self.shares = mixture_weights(self.mix, sizes)
        for name, report in self.filter_report.items():
            log.info(
                f"{name}: {report.kept:,} steps to train on ({self.shares[name]:.1%} of the samples); left out "
                f"{report.noops:,} no-ops and {report.unlabelled:,} of {report.trajectories:,} trajectories (no words)"
            )

    def _steps(self, split: str) -> dict[str, DatasetSteps]:
        found = {}
        for name, source in self.sources.items():
            steps, report = select(source, split, val_fraction=self.val_fraction, filter_noops=self.filter_noops)
            found[name] = DatasetSteps(source, steps, self.normalisation, self.action_chunk)
            if split == "train":
                self.filter_report[name] = report
        return found

    @property
    def statistics(self) -> dict[str, DatasetStatistics]:
        """Each dataset's statistics, by the name that is its `unnorm_key`."""
        return {name: source.statistics for name, source in self.sources.items()}

    @property
    def epoch_samples(self) -> int:
        """Samples after which every dataset of weight 1 (without one: every dataset) was seen once, as released."""
        primary = [name for name in self.train if self.mix[name] == 1.0] or list(self.train)
        return max(1, int(max(len(self.train[name]) / self.shares[name] for name in primary) + 1e-6))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the mixture, from the sample where the last checkpoint stopped."""
        names = list(self.train)
        order = GlobalOrder([len(self.train[n]) for n in names], [self.shares[n] for n in names], self.seed)
        batches = StepBatches(self.train, order, self.image_size, self.cameras, self.augmentation, self.seed)
        world, rank = self._world()
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        if self.global_batch_size % (world * accumulated):
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} cannot be shared by {world} devices with "
                f"accumulate_grad_batches={accumulated}: it must be a multiple of {world * accumulated}"
            )
        size = self.global_batch_size // accumulated
        return self._loader(batches, BatchNumbers(self._next_sample, size, self.epoch_samples, world, rank))

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out steps of all datasets, each once, in one fixed shuffled order."""
        held_out = {name: steps for name, steps in self.val.items() if len(steps)}
        order = HeldOutOrder([len(steps) for steps in held_out.values()] or [0], self.seed)
        batches = StepBatches(held_out, order, self.image_size, self.cameras)
        total = sum(len(steps) for steps in held_out.values())
        if self.limit_val_samples is not None:
            total = min(total, self.limit_val_samples)
        world, rank = self._world()
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        size = max(world, self.global_batch_size // accumulated)
        return self._loader(batches, BatchNumbers(lambda: 0, size, total, world, rank, whole=True))

    def _loader(self, batches: StepBatches, numbers: "BatchNumbers") -> DataLoader[Any]:
        parallel: dict[str, Any] = {}
        if self.num_workers:
            parallel = {"num_workers": self.num_workers, "persistent_workers": True, "prefetch_factor": 4}
        return Loader(batches, batch_size=None, sampler=numbers, collate_fn=self.collate, **parallel)  # type: ignore[arg-type]

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _next_sample(self) -> int:
        overfit = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return 0 if overfit else self.samples_served

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count what training was given; loaders run ahead, so they cannot know."""
        if self.trainer is not None and self.trainer.training:
            self.samples_served += self.global_batch_size // self.trainer.accumulate_grad_batches
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: one number, and what makes it mean the same."""
        return {"samples_served": self.samples_served, "seed": self.seed, "mix": self.mix}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.samples_served = state_dict["samples_served"]
        changed = [name for name in ("seed", "mix") if state_dict.get(name) != getattr(self, name)]
        if changed:
            log.warning(f"data.{' and data.'.join(changed)} changed since the checkpoint: the order is another one now")


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


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cores // devices // 2) if cores // devices > 2 else 0
