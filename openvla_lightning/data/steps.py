"""From an indexed dataset to the steps that are served: split, filters, normalisation, chunks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.augment import Augmentation
from openvla_lightning.data.images import resize
from openvla_lightning.data.mixture import key, mix, uniform
from openvla_lightning.data.oxe.registry import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.index import Index
from openvla_lightning.statistics import Normalisation
from openvla_lightning.types import Step

Order = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True)
class FilterReport:
    """What a split had and what was left out of it.

    Attributes:
        trajectories: in the split, before filters.
        steps: in the split, before filters.
        unlabelled: trajectories without any instruction, left out as released.
        noops: steps left out because the robot stood still.
        kept: steps that are served.
    """

    trajectories: int
    steps: int
    unlabelled: int
    noops: int
    kept: int

    def to_dict(self) -> dict[str, int]:
        """The same as a dictionary."""
        return asdict(self)


def split_trajectories(index: Index, split: str, val_fraction: float, name: str) -> NDArray[np.bool_]:
    """Which trajectories belong to `train` or `val`, bool [K].

    As released: a split called `val` is the validation split where there is one; otherwise the last part of `train`.

    Raises:
        ValueError: there is no split called `train`.
    """
    if "train" not in index.splits:
        raise ValueError(f"{name}: no split is called 'train'; there are {', '.join(index.splits)}")
    if "val" in index.splits:
        return index.split == index.splits.index(split)
    train = np.flatnonzero(index.split == index.splits.index("train"))
    cut = round(len(train) * (1 - val_fraction))
    chosen = np.zeros(index.num_trajectories, bool)
    chosen[train[:cut] if split == "train" else train[cut:]] = True
    return chosen


def noops(index: Index, spec: DatasetSpec) -> NDArray[np.bool_]:
    """Which steps stand still, bool [N].

    A step does when the norm of its changing dimensions is below the dataset's threshold and its absolute ones (the
    gripper) equal those of the last step that was kept; before any was kept, the norm decides alone.
    """
    if spec.noop_threshold is None or not index.num_steps:
        return np.zeros(index.num_steps, bool)
    absolute = np.array(spec.absolute_mask(index.action.shape[1]))
    still = np.linalg.norm(index.action[:, ~absolute], axis=1) < spec.noop_threshold
    # The last kept step held the previous step's gripper: it was that step, or that one was dropped as equal.
    held = index.action[:, absolute]
    same = np.append(False, (held[1:] == held[:-1]).all(axis=1))
    steps = np.arange(index.num_steps)
    first_kept = np.full(index.num_trajectories, index.num_steps)
    np.minimum.at(first_kept, index.trajectory[~still], steps[~still])
    return still & (same | (steps < first_kept[index.trajectory]))


def select(
    source: Source, split: str, *, val_fraction: float, filter_noops: bool
) -> tuple[NDArray[np.int32], FilterReport]:
    """Return the steps of `split` that are served, and what was left out."""
    index = source.index
    trajectories = split_trajectories(index, split, val_fraction, source.name)
    labelled = np.zeros(index.num_trajectories, bool)
    has_words = np.array([bool(words.strip()) for words in index.instructions], bool)
    labelled[index.trajectory[has_words[index.instruction]]] = True
    in_split = trajectories[index.trajectory]
    usable = (trajectories & labelled)[index.trajectory]
    idle = noops(index, source.spec) & usable if filter_noops else np.zeros_like(usable)
    kept = np.flatnonzero(usable & ~idle).astype(np.int32)
    nonempty = np.diff(index.bounds) > 0
    report = FilterReport(
        trajectories=int(trajectories.sum()),
        steps=int(in_split.sum()),
        unlabelled=int((trajectories & ~labelled & nonempty).sum()),
        noops=int(idle.sum()),
        kept=len(kept),
    )
    return kept, report


class DatasetSteps:
    """The served steps of one dataset.

    Args:
        source: the dataset.
        steps: which steps of its index, ascending, int [n].
        normalisation: how actions are scaled.
        action_chunk: T, actions per step.
    """

    def __init__(
        self, source: Source, steps: NDArray[np.int32], normalisation: Normalisation, action_chunk: int
    ) -> None:
        self.source, self.steps, self.normalisation, self.action_chunk = source, steps, normalisation, action_chunk

    def __len__(self) -> int:
        return len(self.steps)

    def actions(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Normalised actions [n, T, D].

        Past the end of a trajectory absolute dimensions repeat the last value and changes are 0, as released.
        """
        index, statistics = self.source.index, self.source.statistics
        wanted = positions[:, None] + np.arange(self.action_chunk)
        places = np.minimum(wanted, len(self.steps) - 1)
        trajectory = index.trajectory
        own = trajectory[self.steps[positions]][:, None]
        if self.action_chunk > 1:
            ends = np.searchsorted(self.steps, index.bounds[own + 1]) - 1
            places = np.minimum(places, ends)
        actions = statistics.normalise(index.action[self.steps[places]], self.normalisation)
        absolute = np.array(self.source.spec.absolute_mask(actions.shape[-1]))
        return np.where((wanted > places)[..., None] & ~absolute, np.float32(0), actions)

    def instruction(self, position: int) -> str:
        """What the robot was told."""
        index = self.source.index
        return index.instructions[index.instruction[self.steps[position]]]

    def image(self, role: str, position: int, size: int) -> NDArray[np.uint8]:
        """A camera's image, uint8 [size, size, 3]; black where the dataset has none."""
        image = self.source.image(role, int(self.steps[position]))
        return np.zeros((size, size, 3), np.uint8) if image is None else resize(image, size)


class StepBatches:
    """Maps lists of sample numbers to lists of `Step`s; what a torch DataLoader reads.

    Args:
        datasets: name -> its served steps.
        order: sample numbers -> datasets, positions.
        image_size: side of the square images.
        cameras: roles to load.
        augmentation: applied to every image, or None.
        seed: of the augmentation.
    """

    def __init__(
        self,
        datasets: Mapping[str, DatasetSteps],
        order: Order,
        image_size: int,
        cameras: Sequence[str],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.names, self.datasets, self.order = list(datasets), list(datasets.values()), order
        self.image_size, self.cameras, self.augmentation, self.seed = image_size, cameras, augmentation, seed

    def __getitem__(self, numbers: Sequence[int]) -> list[Step]:
        asked = np.asarray(numbers, np.int64)
        chosen, positions = self.order(asked)
        actions: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(asked)
        for i in np.unique(chosen).tolist():
            own = np.flatnonzero(chosen == i)
            for row, action in zip(own.tolist(), self.datasets[i].actions(positions[own]), strict=True):
                actions[row] = action
        places = [(self.datasets[i], p) for i, p in zip(chosen.tolist(), positions.tolist(), strict=True)]
        images = {role: self._images(role, places, asked) for role in self.cameras}
        return [
            Step(
                images={role: pixels[row] for role, pixels in images.items()},
                instruction=dataset.instruction(position),
                action=actions[row],
                dataset_name=self.names[chosen[row]],
            )
            for row, (dataset, position) in enumerate(places)
        ]

    def _images(
        self, role: str, places: Sequence[tuple[DatasetSteps, int]], numbers: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        pixels = np.stack([dataset.image(role, position, self.image_size) for dataset, position in places])
        if self.augmentation is None:
            return pixels
        # a function of seed, sample and camera: the same whichever worker draws it, and after a restart
        streams = mix(key(self.seed, 4, *role.encode()) + numbers.astype(np.uint64))
        columns = np.arange(self.augmentation.num_draws, dtype=np.uint64)
        draws = uniform(streams[:, None] + columns)
        return self.augmentation(pixels, draws)
