"""The DataModule: it serves datasets as batches."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from torch.utils.data import DataLoader

from openvla_lightning.data.augment import read_augmentation
from openvla_lightning.data.cotraining import beside
from openvla_lightning.data.curriculum import intended, read_curriculum, stages
from openvla_lightning.data.filters import FilterReport, NoopFilter, check_filter, select
from openvla_lightning.data.images import ImageMode
from openvla_lightning.data.loader import ResumableDataModule
from openvla_lightning.data.mixture import GlobalOrder, HeldOutOrder, Stage, check_weights
from openvla_lightning.data.oxe.catalogue import check_names, dataset_spec
from openvla_lightning.data.oxe.registry import check_encodings, describe
from openvla_lightning.data.preflight import (
    BadInstructions,
    check_choices,
    check_ranges,
    check_sources,
    data_errors,
    proprio_width,
    refuse_actions,
    refuse_empty,
    refused_instructions,
    say,
    say_black,
)
from openvla_lightning.data.relative import measure
from openvla_lightning.data.round_trip import LOOKED_AT, RoundTrip, round_trip
from openvla_lightning.data.source import Source, SourceFactory
from openvla_lightning.data.source.transcoded import Cache, cached
from openvla_lightning.data.steps import ChunkEnd, DatasetSteps, StepBatches, felt_columns, windowed_walks
from openvla_lightning.statistics import DatasetStatistics, Normalisation
from openvla_lightning.types import Step, views_of

log = logging.getLogger(__name__)


class VLADataModule(ResumableDataModule):
    """Serves a weighted mixture of robot datasets as batches.

    The order is a function of the seed and the number of the sample: it depends on neither workers nor devices, and a
    checkpoint resumes at the very next sample, also in the middle of an epoch or on another number of devices.

    Args:
        source: builds the source of one dataset when called with `name` and `spec`.
        mix: dataset -> weight; a dataset's share of the samples is proportional to weight x number of steps.
        collate: list of `Step`s -> batch; `Processor.collate`. If it is a method of an object with a method `refuses`,
            the latter says why an instruction cannot be collated.
        image_size: images are resized (Lanczos-3, aspect ratio not kept) to this many pixels squared, if they differ.
        global_batch_size: samples in one optimiser step, over all devices and accumulated batches.
        balance_weights: shares are proportional to weight x number of steps, as released; False: to the weight.
        curriculum: changes of the mixture during training, each `{after: share or steps, mix: {dataset: weight}}`.
        normalisation: `quantile` (q01..q99 to -1..1), `minmax` or `meanstd`.
        statistics: `released` (over all splits, before filters) or `train` (over the steps that are trained on).
        noop_filter: which steps are left out as no-ops; see `filters.select`.
        filter_noops: False is short for `noop_filter="none"`.
        action_chunk: actions per step.
        chunk_end: treatment of chunks that reach past the end of their trajectory; see `DatasetSteps`.
        val_fraction: share of the trajectories to hold out in datasets without a split `val`.
        augment: operations of `Augmentation` for training images; None: no augmentation.
        cameras: roles to load as views, in order; one that a dataset lacks is black, but the first must exist.
        history: of how many steps to load pictures, the present one included.
        proprio: load the robot's state, normalised like actions.
        images: `released` (decoded and resized as the released pipeline does) or `fast`.
        cache: `jpeg` converts video frames and PNGs once into JPEG records, which are read many times faster.
        window_gb: for storage that is slow to read at random: shuffle within this many gigabytes of shards at a time;
            None: over the whole dataset.
        datasets: the user's own datasets, name -> options of `oxe.describe`.
        seed: seed of order and augmentation.
        num_workers: loader processes per device; None: one for every two cores, at most 8, none on two cores.
        conversations: arguments of `CoTraining`, for conversations that are learnt beside the steps; None: none.
        bad_instructions: `skip` leaves out and counts steps with instructions that the model cannot take; `error`
            stops.
        limit_val_samples: at most this many held-out steps, over all datasets; None: all.

    Attributes:
        statistics: each dataset's statistics by its name, which is its `unnorm_key`; after `setup`.
        filter_report: which steps were left out of each dataset; after `setup`.
        order: sample numbers -> datasets and positions; after `train_dataloader`.
        crop_area: share of an image's area that training crops; acting uses a centre crop of it. None: no crop.

    Raises:
        ValueError: an argument is not valid, or a dataset is unknown (the message lists the known ones).
    """

    def __init__(
        self,
        source: SourceFactory,
        mix: Mapping[str, float],
        collate: Callable[[list[Step]], Any],
        image_size: int,
        global_batch_size: int,
        balance_weights: bool = True,
        curriculum: Sequence[Mapping[str, Any]] | None = None,
        normalisation: Normalisation = "quantile",
        statistics: Literal["released", "train"] = "released",
        noop_filter: NoopFilter = "near_zero",
        filter_noops: bool = True,
        action_chunk: int = 1,
        chunk_end: ChunkEnd = "neutral",
        val_fraction: float = 0.05,
        augment: Mapping[str, Any] | None = None,
        cameras: Sequence[str] = ("primary",),
        history: int = 1,
        proprio: bool = False,
        images: ImageMode = "released",
        cache: Cache = "none",
        window_gb: float | None = None,
        datasets: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 7,
        num_workers: int | None = None,
        limit_val_samples: int | None = None,
        bad_instructions: BadInstructions = "skip",
        conversations: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(collate, global_batch_size, num_workers)
        check_weights(mix)
        self.curriculum = read_curriculum(mix, curriculum)
        weights = [mix, *(change.mix for change in self.curriculum)]
        check_names([name for part in weights for name in part], datasets or {})
        check_filter(noop_filter)
        check_choices(
            normalisation=(normalisation, get_args(Normalisation)),
            statistics=(statistics, ("released", "train")),
            images=(images, get_args(ImageMode)),
            cache=(cache, get_args(Cache)),
            bad_instructions=(bad_instructions, get_args(BadInstructions)),
            chunk_end=(chunk_end, get_args(ChunkEnd)),
        )
        check_ranges(window_gb, val_fraction, image_size, action_chunk, limit_val_samples)
        self.mix = {name: float(weight) for name, weight in mix.items() if weight > 0}
        self.image_size, self.balance_weights, self.normalisation = image_size, balance_weights, normalisation
        self.action_chunk, self.chunk_end = action_chunk, chunk_end
        self.noop_filter: NoopFilter = noop_filter if filter_noops else "none"
        self.measure_training_split, self.images, self.window_gb = statistics == "train", images, window_gb
        self.val_fraction, self.cameras, self.seed = val_fraction, tuple(cameras), seed
        self.history, self.proprio = history, proprio
        served = {"image_size": image_size, "cameras": cameras, "images": images}
        self._pictures: dict[str, Any] = {**served, "history": history, "proprio": proprio}
        views_of(cameras, history)
        self.limit_val_samples, self.bad_instructions = limit_val_samples, bad_instructions
        processor = getattr(collate, "__self__", None)
        self.refuses: Callable[[str, int], str | None] = getattr(processor, "refuses", lambda words, dim: None)
        self.augmentation, self.crop_area = read_augmentation(augment)
        specs = {name: describe(name, options) for name, options in (datasets or {}).items()}
        drawn = dict.fromkeys(name for part in weights for name, weight in part.items() if weight > 0)
        check_encodings(specs.get(name) or dataset_spec(name) for name in drawn)
        self.sources: dict[str, Source] = {
            name: cached(source(name=name, spec=specs.get(name)), cache, self.cameras) for name in drawn
        }
        self.cotraining = beside(conversations, image_size, seed, proprio)
        self.filter_report: dict[str, FilterReport] = {}
        self.statistics: dict[str, DatasetStatistics] = {}
        self.stages: list[Stage] = []
        self.round_trips: dict[str, RoundTrip] = {}

    def missing(self) -> list[str]:
        """Names of the mixture's datasets that are not on disk."""
        return [name for name, source in self.sources.items() if source.missing()]

    def check(self) -> None:
        """Check in milliseconds whether training could start; raise as `check_sources` does."""
        check_sources(self.sources, self.cameras)
        for cotraining in self.cotraining:
            cotraining.check()

    @data_errors()
    def prepare_data(self) -> None:
        """Index the datasets and measure their statistics, if not done before; raise as `data_errors` does."""
        self.check()
        for source in self.sources.values():
            source.prepare()
        for cotraining in self.cotraining:
            cotraining.source.prepare()

    @data_errors()
    def setup(self, stage: str | None = None) -> None:
        """Open the indexed datasets, split and filter them, log what is left out; raise as `data_errors` does."""
        if self.filter_report:
            return
        self.check()
        dims = {name: source.statistics.action_dim for name, source in self.sources.items()}
        if len(set(dims.values())) > 1:
            raise ValueError(f"one model cannot learn actions of different dimensions: {dims}")
        _ = self.proprio_dim
        say_black(self.sources, self.cameras)
        self.refused = {
            name: refused_instructions(source, self.refuses, dims[name], self.bad_instructions)
            for name, source in self.sources.items()
        }
        self.train, self.val = self._steps("train"), self._steps("val")
        sizes = {name: source.statistics.num_transitions for name, source in self.sources.items()}
        refuse_empty(self.train, self.val, self.filter_report)
        max_steps = self.trainer.max_steps if self.trainer else -1
        numbers = {"max_steps": max_steps, "global_batch_size": self.global_batch_size}
        self.stages = stages(self.mix, self.curriculum, sizes, balance=self.balance_weights, **numbers)
        self.shares = dict(zip(sizes, self.stages[0].shares, strict=True))
        self.round_trips = {
            name: round_trip(steps.spread(LOOKED_AT), steps.statistics, self.normalisation, steps.source.spec)
            for name, steps in self.train.items()
        }
        for name, report in self.filter_report.items():
            say(self.train[name], report, self.shares[name], self.round_trips[name])
        if self.trainer is not None:
            refuse_actions(self.round_trips)

    def _steps(self, split: str) -> dict[str, DatasetSteps]:
        steps_by_name = {}
        for name, source in self.sources.items():
            steps, report = select(
                source, split, val_fraction=self.val_fraction, noop_filter=self.noop_filter, refused=self.refused[name]
            )
            felt = felt_columns(source) if self.proprio else None
            if split == "train":
                own = self.measure_training_split and len(steps) > 0  # `refuse_empty` says why none is left
                measured = measure(source, steps if own else None, self.action_chunk)
                self.filter_report[name] = report
                self.statistics[name] = measured if felt is None else measured.felt(felt)
            scale = (self.statistics[name], self.normalisation)
            steps_by_name[name] = DatasetSteps(source, steps, *scale, self.action_chunk, self.chunk_end, felt)
        return steps_by_name

    @property
    def proprio_dim(self) -> int | None:
        """P, the state's width in every dataset; None if no state is loaded. After `prepare_data`."""
        return proprio_width(self.sources) if self.proprio else None

    @property
    def epoch_samples(self) -> int:
        """Samples after which all datasets of weight 1 (or else all datasets) were served once, as released."""
        primary = [name for name in self.mix if self.mix[name] == 1.0] or list(self.mix)
        return max(1, int(max(len(self.train[name]) / self.shares[name] for name in primary) + 1e-6))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the mixture, starting at the sample where the last checkpoint stopped.

        Raises:
            ValueError: a dataset has actions outside the range of a policy.
        """
        refuse_actions(self.round_trips)
        sizes = [len(steps) for steps in self.train.values()]
        walks = windowed_walks(self.train, self.window_gb) if self.window_gb is not None else {}
        self.order = GlobalOrder(sizes, self.stages, self.seed, walks)
        batches = StepBatches(self.train, self.order, swap_seed=self.seed, **self._pictures)
        for cotraining in self.cotraining:
            cotraining.rank = self._world()[1]
        return self.training_loader(batches, self.epoch_samples)

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out steps of all datasets, each once, in one fixed shuffled order."""
        held_out = {name: steps for name, steps in self.val.items() if len(steps)}
        order = HeldOutOrder([len(steps) for steps in held_out.values()] or [0], self.seed)
        batches = StepBatches(held_out, order, **self._pictures)
        total = sum(len(steps) for steps in held_out.values())
        if self.limit_val_samples is not None:
            total = min(total, self.limit_val_samples)
        return self.held_out_loader(batches, total)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training images on the device."""
        if self.augmentation is None or self.trainer is None or not self.trainer.training:
            return batch
        pixels = self.augmentation.views(batch.pixel_values, self.seed, batch.numbers, len(self.cameras))
        return replace(batch, pixel_values=pixels)

    def where(self, number: int) -> str:
        """The place of a training sample, in words: its trajectory, step and file."""
        (dataset,), (position,) = self.order(np.array([number]))
        return (steps := [*self.train.values()][dataset]).source.where(int(steps.steps[position]))

    def served(self) -> dict[str, tuple[int, float]]:
        """For each dataset, how many steps were served to training so far, and how many the weights intend."""
        steps = self.order.served(self.samples_served).tolist()
        return dict(zip(self.train, zip(steps, intended(self.stages, self.samples_served), strict=True), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The next sample's number, and the settings that define which sample this is."""
        return {"samples_served": self.samples_served} | self._meaning()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the sample of `state_dict`."""
        self.samples_served = state_dict["samples_served"]
        if changed := [name for name, value in self._meaning().items() if state_dict.get(name, value) != value]:
            log.warning(f"data.{' and data.'.join(changed)} changed since the checkpoint: the order is another one now")

    def _meaning(self) -> dict[str, Any]:
        same = ["seed", "mix", "balance_weights", "noop_filter", "val_fraction", "window_gb"]
        same += ["chunk_end", "action_chunk"] if self.chunk_end == "drop" else []
        changes = {"curriculum.mix": [dict(change.mix) for change in self.curriculum]}
        return {name: getattr(self, name) for name in same} | changes | {"curriculum": [s.start for s in self.stages]}
