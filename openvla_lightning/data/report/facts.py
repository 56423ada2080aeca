"""An indexed dataset in numbers. All of them come from its index, except the size of images."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.datamodule import VLADataModule
from openvla_lightning.data.filters import FilterReport, spoken
from openvla_lightning.data.report.motion import (
    Dimension,
    Duplicates,
    Idle,
    find_duplicates,
    measure_actions,
    measure_idle,
)
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.index import Index
from openvla_lightning.statistics import DatasetStatistics


@dataclass(frozen=True)
class Selection:
    """A dataset and the steps that training uses.

    Attributes:
        source: the dataset, prepared.
        train, val: steps of its index that are trained on and held out, ascending, int [n].
        filters: the steps that were left out of training.
        statistics: statistics that scale the actions.
        share: share of the mixture's samples.
    """

    source: Source
    train: NDArray[Any]
    val: NDArray[Any]
    filters: FilterReport
    statistics: DatasetStatistics
    share: float


def selections(datamodule: VLADataModule) -> list[Selection]:
    """The selection of every dataset; the DataModule must be set up."""
    return [
        Selection(
            source=source,
            train=datamodule.train[name].steps,
            val=datamodule.val[name].steps,
            filters=datamodule.filter_report[name],
            statistics=datamodule.statistics[name],
            share=datamodule.shares[name],
        )
        for name, source in datamodule.sources.items()
    ]


@dataclass(frozen=True)
class Words:
    """The instructions of a dataset.

    Attributes:
        steps, trajectories: share that has an instruction; a trajectory has one if any of its steps does.
        distinct: different instructions.
        distinct_loosely: the same, ignoring case, spaces and full stops.
        frequent: (instruction, trajectories, steps), most trajectories first.
        ending: instructions that end in . ? or !; the prompt adds a second end.
    """

    steps: float
    trajectories: float
    distinct: int
    distinct_loosely: int
    frequent: tuple[tuple[str, int, int], ...]
    ending: tuple[str, ...] = ()


@dataclass(frozen=True)
class Camera:
    """Images of one camera.

    Attributes:
        role, key: its name here and under `observation`; without a key, its images are black.
        missing: share of steps without an image.
        mean_bytes: mean size of an encoded image.
        total_bytes: size of all images.
        sizes: (height, width) -> number of images of that size, among the first images of some trajectories.
    """

    role: str
    key: str | None
    missing: float
    mean_bytes: float
    total_bytes: int
    sizes: Mapping[tuple[int, int], int]


@dataclass(frozen=True)
class Facts:
    """One dataset.

    Attributes:
        name: of the dataset.
        splits: split -> trajectories, steps.
        lengths: int64 [K], steps of each trajectory.
        control_hz: steps per second, where known.
        filters: the steps that training leaves out.
        share: share of the mixture's samples.
        held_out: steps held out for validation.
        clipped: share of the training steps with any value outside q01..q99.
        skipped: trajectories that could not be read: file, number in it, reason.
        remarks: remarks of its source on the files.
    """

    name: str
    splits: Mapping[str, tuple[int, int]]
    lengths: NDArray[np.int64]
    control_hz: float | None
    filters: FilterReport
    share: float
    held_out: int
    clipped: float
    dimensions: tuple[Dimension, ...]
    idle: Idle
    words: Words
    duplicates: Duplicates
    cameras: tuple[Camera, ...]
    skipped: tuple[Mapping[str, Any], ...]
    remarks: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """In all splits."""
        return int(self.lengths.sum())

    @property
    def trajectories(self) -> int:
        """In all splits, empty ones left out."""
        return int((self.lengths > 0).sum())


def gather(selection: Selection) -> Facts:
    """Measure a dataset."""
    source, train, val = selection.source, selection.train, selection.val
    index = source.index
    lengths = np.diff(index.bounds)
    splits = {
        name: (int((index.split == i).sum()), int(lengths[index.split == i].sum()))
        for i, name in enumerate(index.splits)
    }
    relative = selection.statistics.relative_to is not None
    statistics = source.statistics if relative else selection.statistics  # the report shows the recorded actions
    dimensions, clipped = measure_actions(index, statistics, train)
    return Facts(
        name=source.name,
        splits=splits,
        lengths=lengths,
        control_hz=source.spec.control_hz,
        filters=selection.filters,
        share=selection.share,
        held_out=len(val),
        clipped=clipped,
        dimensions=dimensions,
        idle=measure_idle(index, source.spec, statistics, train),
        words=measure_words(index),
        duplicates=find_duplicates(index, train, val),
        cameras=tuple(measure_camera(source, role) for role in source.spec.cameras),
        skipped=index.skipped,
        remarks=source.remarks,
    )


SENTENCE_ENDS = (".", "?", "!", "\u3002", "\uff1f", "\uff01")
"""Marks that end a sentence; the last three are Chinese and Japanese."""


def measure_words(index: Index, top: int = 10) -> Words:
    """How many steps and trajectories have an instruction, and the instructions."""
    has_words = spoken(index)
    steps = np.bincount(index.instruction, minlength=len(index.instructions))
    full = np.diff(index.bounds) > 0
    changes = np.append(True, index.instruction[1:] != index.instruction[:-1])[: index.num_steps]
    changes[index.bounds[:-1][full]] = True
    pairs = np.unique(np.stack([index.trajectory[changes], index.instruction[changes]]), axis=1)
    trajectories = np.bincount(pairs[1], minlength=len(index.instructions))
    order = [i for i in np.lexsort((-steps, -trajectories)).tolist() if has_words[i]]
    loosely = {" ".join(index.instructions[i].lower().replace(".", " ").split()) for i in order}
    labelled = len(np.unique(pairs[0][has_words[pairs[1]]]))
    return Words(
        steps=float(steps[has_words].sum() / max(1, index.num_steps)),
        trajectories=labelled / max(1, int(full.sum())),
        distinct=len(order),
        distinct_loosely=len(loosely),
        frequent=tuple((index.instructions[i], int(trajectories[i]), int(steps[i])) for i in order[:top]),
        ending=tuple(index.instructions[i] for i in order if index.instructions[i].rstrip().endswith(SENTENCE_ENDS)),
    )


def measure_camera(source: Source, role: str) -> Camera:
    """Images of one camera.

    Raises:
        ValueError: an image cannot be decoded.
    """
    index = source.index
    lengths = index.images[role][:, 2]
    there, total = int((lengths > 0).sum()), int(lengths.sum())
    first = [source.pixels(role, int(index.bounds[trajectory])) for trajectory in spread(index)]
    return Camera(
        role=role,
        key=source.spec.cameras[role],
        missing=1 - there / max(1, len(lengths)),
        mean_bytes=total / max(1, there),
        total_bytes=total,
        sizes=Counter(image.shape[:2] for image in first if image is not None),
    )


def spread(index: Index, parts: int = 8) -> list[int]:
    """One random trajectory from each of `parts` parts of the dataset; random, because datasets are often periodic."""
    full = np.array_split(np.flatnonzero(np.diff(index.bounds)), parts)
    return [int(np.random.default_rng(i).choice(part)) for i, part in enumerate(full) if len(part)]
