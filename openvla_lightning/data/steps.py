"""Makes `Step`s from an indexed dataset: normalisation, chunks, images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import ImageMode
from openvla_lightning.data.loader import SampleError
from openvla_lightning.data.mixture import Walk, WindowedWalk
from openvla_lightning.data.permutation import key, uniform
from openvla_lightning.data.source import Source
from openvla_lightning.statistics import DatasetStatistics, Normalisation
from openvla_lightning.types import Observation, Step, camera_of, views_of

ChunkEnd = Literal["neutral", "mask", "drop"]
Order = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]


class DatasetSteps:
    """The served steps of one dataset.

    Args:
        source: the dataset.
        steps: the served steps of its index, ascending, int [n].
        statistics: statistics that scale the actions.
        normalisation: how actions are scaled.
        action_chunk: T, actions per step.
        chunk_end: treatment of chunks that reach past the end of their trajectory. `neutral`: absolute dimensions
            repeat the last value and changes are 0, as in OpenVLA. `mask`: the same, and `padded` marks these actions,
            so that heads leave them out of the loss. `drop`: no chunk begins at a trajectory's last T - 1 steps,
            and shorter trajectories are left out, as in OpenVLA-OFT.
        felt: columns of the index that make up the proprioception; None: all of them.
    """

    def __init__(
        self,
        source: Source,
        steps: NDArray[np.int32],
        statistics: DatasetStatistics,
        normalisation: Normalisation,
        action_chunk: int,
        chunk_end: ChunkEnd = "neutral",
        felt: NDArray[np.int64] | None = None,
    ) -> None:
        self.source, self.steps, self.statistics, self.felt = source, steps, statistics, felt
        self.normalisation, self.action_chunk, self.chunk_end = normalisation, action_chunk, chunk_end
        self.whole = steps
        """Chunks consist of these steps; a chunk may begin at those in `steps`."""
        if chunk_end == "drop" and action_chunk > 1:
            self.steps = steps[self._ends(steps) - np.arange(len(steps)) >= action_chunk]

    def __len__(self) -> int:
        return len(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        # There may be tens of millions of steps, so a spawned worker maps their file instead of receiving a copy.
        state = dict(vars(self))
        for name in ("steps", "whole"):
            mapped = state[name].base
            if isinstance(mapped, np.memmap):
                state[name] = Path(str(mapped.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("steps", "whole"):
            if isinstance(path := state[name], Path):
                state = state | {name: np.load(path, mmap_mode="r").view(np.ndarray)}
        vars(self).update(state)

    def _ends(self, steps: NDArray[np.int32]) -> NDArray[np.int64]:
        """For each of `steps`, the place in `whole` where its trajectory ends."""
        index = self.source.index
        return np.searchsorted(self.whole, index.bounds[index.trajectory[steps] + 1])

    def _chunks(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The steps of chunks [n, T], as places in `whole`, and which of them lie past the end of the trajectory."""
        first = self.steps[positions]
        start = positions if self.steps is self.whole else np.searchsorted(self.whole, first)
        wanted = start[:, None] + np.arange(self.action_chunk)
        if self.action_chunk == 1:
            return wanted, np.zeros(wanted.shape, bool)
        places = np.minimum(wanted, self._ends(first)[:, None] - 1)
        return places, wanted > places

    def padded(self, positions: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Which actions of chunks [n, T] the loss leaves out; None unless `chunk_end` is `mask`."""
        return self._chunks(positions)[1] if self.chunk_end == "mask" else None

    def share_past_the_end(self, most: int) -> float:
        """Share of the actions in chunks that lie past the end of their trajectory, of about `most` steps."""
        beyond = self._chunks(self._evenly(most))[1]
        return float(beyond.mean()) if beyond.size else 0.0

    def actions(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Normalised actions [n, T, D]; `chunk_end` defines those past the end of a trajectory."""
        columns = self.statistics.relative_to
        actions, beyond = self.recorded(positions, columns)
        actions = self.statistics.normalise(actions, self.normalisation)
        absolute = np.array(self.source.spec.absolute_mask(actions.shape[-1]))
        if columns is not None:
            absolute |= columns >= 0
        return np.where(beyond[..., None] & ~absolute, np.float32(0), actions)

    def recorded(
        self, positions: NDArray[np.int64], columns: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Chunks [n, T, D] in the dataset's units, and which actions [n, T] lie past the end of the trajectory.

        With `columns`, int64 [D], they are relative to these states at the first step; -1 leaves a dimension unchanged.
        """
        index = self.source.index
        places, beyond = self._chunks(positions)
        actions = index.action[self.whole[places]]
        if columns is not None:
            states = index.proprio[self.steps[positions]][:, columns]
            actions = actions - np.where(columns >= 0, states, np.float32(0))[:, None]
        return actions, beyond

    def normalised(self, proprio: NDArray[np.float32]) -> NDArray[np.float32]:
        """Proprioception [P] in the model's units, scaled like actions, in all dimensions."""
        return self.statistics.normalise(proprio, self.normalisation, "proprio")

    def spread(self, most: int) -> NDArray[np.float32]:
        """Actions of at most about `most` steps, evenly spread, in the dataset's units: float32 [n, D]."""
        return self.recorded(self._evenly(most), self.statistics.relative_to)[0][:, 0]

    def _evenly(self, most: int) -> NDArray[np.int64]:
        return np.arange(0, len(self.steps), max(1, len(self.steps) // most))

    def other(self, role: str) -> str:
        """The role that is exchanged with `role`; `role` itself if none is."""
        swap = self.source.spec.swap
        return swap[1 - swap.index(role)] if swap and role in swap else role

    def instruction(self, position: int) -> str:
        """The instruction of a step."""
        index = self.source.index
        return index.instructions[index.instruction[self.steps[position]]]

    def where(self, position: int) -> str:
        """The place of a step, in words: dataset, trajectory, step and file."""
        return f"{self.source.name}, {self.source.where(int(self.steps[position]))}"

    def image(
        self, role: str, position: int, size: int, mode: ImageMode = "released", back: int = 0
    ) -> NDArray[np.uint8]:
        """A camera's image `back` steps earlier, uint8 [size, size, 3]; black if the dataset has no such camera.

        Before the start of a trajectory, it is the first step's image.

        Raises:
            SampleError: it cannot be read or decoded; the message says where it is.
        """
        black = role not in self.source.spec.cameras
        try:
            image = None if black else self.source.image(role, self._earlier(position, back), size, mode)
        except (ValueError, OSError) as error:
            raise SampleError(f"{self.where(position)}, {role} image: {error}") from error
        return np.zeros((size, size, 3), np.uint8) if image is None else image

    def _earlier(self, position: int, back: int) -> int:
        """The step of the index that was served `back` steps before the one at `position`."""
        step = int(self.steps[position])
        if not back:
            return step
        index = self.source.index
        first = int(np.searchsorted(self.whole, index.bounds[index.trajectory[step]]))
        return int(self.whole[max(first, int(np.searchsorted(self.whole, step)) - back)])

    def proprio(self, position: int) -> NDArray[np.float32]:
        """Proprioception float32 [P], in the robot's units."""
        state = np.asarray(self.source.index.proprio[self.steps[position]], np.float32)
        return state if self.felt is None else state[self.felt]


def felt_columns(source: Source) -> NDArray[np.int64]:
    """Columns of a dataset's proprioception without the blank ones, which stand for missing keys.

    The released statistics include the blank columns; the model's input does not, as in OpenVLA-OFT.
    """
    measured, blanks = source.statistics.proprio, source.spec.state.count(None)
    zero = np.flatnonzero((measured["min"] == 0) & (measured["max"] == 0))
    return np.setdiff1d(np.arange(source.index.proprio.shape[1]), zero[len(zero) - blanks :] if blanks else [])


class StepBatches:
    """Maps lists of sample numbers to lists of `Step`s; a torch DataLoader reads from it.

    Args:
        datasets: name -> its served steps.
        order: sample numbers -> datasets, positions.
        image_size: side of the square images.
        cameras: roles to load.
        history: of how many steps to load pictures, the present one included.
        proprio: load the proprioception.
        images: how images are decoded and resized.
        swap_seed: seed for exchanging cameras at random, in datasets that ask for it; None: never.
    """

    def __init__(
        self,
        datasets: Mapping[str, DatasetSteps],
        order: Order,
        image_size: int,
        cameras: Sequence[str],
        images: ImageMode = "released",
        swap_seed: int | None = None,
        history: int = 1,
        proprio: bool = False,
    ) -> None:
        self.names, self.datasets, self.order = list(datasets), list(datasets.values()), order
        self.image_size, self.views, self.images = image_size, views_of(cameras, history), images
        self.swap_seed, self.proprio = swap_seed, proprio

    def __getitem__(self, numbers: Sequence[int]) -> list[Step]:
        sample_numbers = np.asarray(numbers, np.int64)
        chosen, positions = self.order(sample_numbers)
        actions: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(sample_numbers)
        padded: list[NDArray[np.bool_] | None] = [None] * len(sample_numbers)
        for i in np.unique(chosen).tolist():
            rows = np.flatnonzero(chosen == i)
            for row, action in zip(rows.tolist(), self.datasets[i].actions(positions[rows]), strict=True):
                actions[row] = action
            if (past := self.datasets[i].padded(positions[rows])) is not None:
                for row, mask in zip(rows.tolist(), past, strict=True):
                    padded[row] = mask
        places = [(self.datasets[i], p) for i, p in zip(chosen.tolist(), positions.tolist(), strict=True)]
        images = {view: self._images(view, places, sample_numbers) for view in self.views}
        steps = []
        for row, (dataset, position) in enumerate(places):
            state = dataset.proprio(position) if self.proprio else None
            pictures = {view: pixels[row] for view, pixels in images.items()}
            steps.append(
                Step(
                    observation=Observation(pictures, dataset.instruction(position), state),
                    action=actions[row],
                    dataset_name=self.names[chosen[row]],
                    number=int(sample_numbers[row]),
                    proprio=None if state is None else dataset.normalised(state),
                    padded=padded[row],
                )
            )
        return steps

    def where(self, number: int) -> str:
        """The place of a sample, in words."""
        (dataset,), (position,) = self.order(np.array([number]))
        return self.datasets[dataset].where(int(position))

    def _images(
        self, view: str, places: Sequence[tuple[DatasetSteps, int]], numbers: NDArray[np.int64]
    ) -> list[NDArray[np.uint8]]:
        role, back = camera_of(view)
        swapped = np.zeros(len(numbers), bool)
        if self.swap_seed is not None:
            swapped = uniform(key(self.swap_seed, 6) + numbers.astype(np.uint64)) < 0.5
        return [
            dataset.image(dataset.other(role) if other else role, position, self.image_size, self.images, back)
            for (dataset, position), other in zip(places, swapped.tolist(), strict=True)
        ]


def windowed_walks(datasets: Mapping[str, DatasetSteps], gigabytes: float) -> dict[int, Walk]:
    """Orders that shuffle within `gigabytes` of shards, shared by all datasets in files; other datasets get none."""
    walks: dict[int, Walk] = {}
    for i, dataset in enumerate(datasets.values()):
        index = dataset.source.index
        if len(index.sizes):
            bounds = np.searchsorted(dataset.steps, index.shards)
            walks[i] = WindowedWalk(bounds, index.sizes, int(gigabytes * 1e9 / len(datasets)))
    return walks
