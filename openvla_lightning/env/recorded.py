"""Recorded data in place of a world: held-out steps to predict, and recorded episodes to replay in a world."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.base import EnvFactory, RequestError, refusing
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Step


class HeldOut(Protocol):
    """The part of a DataModule that evaluations need."""

    mix: Mapping[str, float]

    @property
    def statistics(self) -> Mapping[str, DatasetStatistics]:
        """Each dataset's statistics, with which its steps were normalised."""

    def check(self) -> None:
        """Check quickly whether the datasets are there."""

    def prepare_data(self) -> None:
        """Index the datasets, if not done before."""

    def setup(self, stage: str) -> None:
        """Open the datasets."""

    def val_dataloader(self) -> Iterable[list[Step]]:
        """Batches of the held-out split, from `collate`."""

    def train_dataloader(self) -> Iterable[list[Step]]:
        """Batches of the mixture."""


class Offline:
    """Predict the actions of held-out demonstrations.

    The paper stops training by token accuracy (section 3.4: above 95 %), but a policy with a good accuracy may still
    fail in closed loop: success rates need a simulator or a robot.

    Args:
        data: builds a `VLADataModule` when called with `collate` and a policy's `reads`.
        dataset: the dataset of the mixture; None: all datasets.
        num_steps: number of held-out steps per dataset; fewer if the split is smaller.
    """

    kind = "held_out"
    stage = "validate"

    def __init__(self, data: Callable[..., HeldOut], dataset: str | None = None, num_steps: int = 1000) -> None:
        if num_steps < 1:
            raise RequestError(f"num_steps must be at least 1, got {num_steps}")
        self.build, self.dataset, self.num_steps = data, dataset, num_steps

    def check(self) -> None:
        """Check, before a model is loaded, whether the data for its predictions is there.

        Raises:
            FileNotFoundError: when the data is not there.
            ValueError: when `dataset` is unknown.
        """
        with refusing():
            data = self.build(collate=list, image_size=1, normalisation="quantile")  # these values do not matter here
            self._names(data)
            data.check()

    def open(self, **reads: Any) -> tuple[Iterator[list[Step]], Mapping[str, DatasetStatistics], list[str]]:
        """Open the held-out split for a policy.

        Args:
            reads: `Policy.reads`: image size, views, normalisation, ... of its training.

        Returns:
            Lists of steps, each list from one dataset, with `num_steps` per dataset in all; the statistics that
            normalised their actions, by dataset; the datasets' names.
        """
        with refusing():
            data = self.build(collate=list, **reads)
            names = self._names(data)
            data.prepare_data()
            data.setup(self.stage)
        return self._batches(data, names), data.statistics, names

    def _loader(self, data: HeldOut) -> Iterable[list[Step]]:
        return data.val_dataloader()

    def _names(self, data: HeldOut) -> list[str]:
        known = list(data.mix)
        if self.dataset is None:
            return known
        if self.dataset not in known:
            raise RequestError(
                f"dataset {self.dataset!r} is not held out here: env.dataset=... takes one of {', '.join(known)}"
            )
        return [self.dataset]

    def _batches(self, data: HeldOut, names: list[str]) -> Iterator[list[Step]]:
        left = dict.fromkeys(names, self.num_steps)
        for batch in self._loader(data):
            for name in names:
                if steps := list(islice((step for step in batch if step.dataset_name == name), left[name])):
                    yield steps
                left[name] -= len(steps)
            if not any(left.values()):
                return


class TrainingSteps(Offline):
    """As `Offline`, with training steps; see `openvla_lightning.evaluation.open_loop`."""

    kind = "open_loop"
    stage = "fit"

    def _loader(self, data: HeldOut) -> Iterable[list[Step]]:
        return data.train_dataloader()


class RecordedEpisode:
    """A recorded episode: its start, its actions, and its observations.

    Attributes:
        task, seed: arguments of `reset`.
        executed: float64 [T, D], the executed actions in the dataset's units.
        images: uint8 [H, W, 3] at each step.
        proprio: float32 [T, P].
    """

    def __init__(self, episode: dict[str, Any], decode: Callable[[bytes], NDArray[np.uint8]], where: Path) -> None:
        about, steps = episode.get("episode_metadata", {}), episode["steps"]
        if absent := [name for name in ("task", "seed") if name not in about]:
            raise RequestError(
                f"the episodes of {where} do not say where they began (episode_metadata/{', '.join(absent)}), so no "
                "simulator can be set up as they were. What can be compared without one: env=open_loop, and the data "
                "report, which holds actions against recorded motion"
            )
        if "executed_action" not in steps:
            raise RequestError(
                f"{where} holds what the expert meant to do and not what was executed: it was made by an earlier "
                f"version. Remove {where.parent} and run again"
            )
        self.task, self.seed = about["task"].decode(), int(about["seed"])
        self.executed = np.asarray(steps["executed_action"], np.float64)
        self.images = [decode(bytes(image)) for image in steps["observation"]["image"]]
        self.proprio = np.asarray(steps["observation"]["proprio"], np.float32)


@dataclass(frozen=True, slots=True)
class Replayed:
    """Result of a replayed episode: all its pictures [H, W, 3] and states [P], and whether it succeeded."""

    images: list[NDArray[np.uint8]]
    proprio: NDArray[np.float32]
    success: bool


class Replay:
    """A world, and the episodes of a dataset that stores where each episode began.

    Args:
        world: builds the world, with the robot of the dataset.
        source: builds the dataset's source when called with `name`.
        dataset: name of the dataset.
        split: split of the dataset.
        num_episodes: number of episodes, from the first one on.
        num_bins: bins of the token head that is to learn them.
    """

    kind = "replay"

    def __init__(
        self,
        world: EnvFactory,
        source: Callable[..., Any],
        dataset: str,
        split: str = "val",
        num_episodes: int = 20,
        num_bins: int = 256,
    ) -> None:
        if num_episodes < 1:
            raise RequestError(f"num_episodes must be at least 1, got {num_episodes}")
        self.world, self.dataset, self.split, self.num_episodes, self.num_bins = (
            world,
            dataset,
            split,
            num_episodes,
            num_bins,
        )
        self.source = source(name=dataset)

    def check(self) -> None:
        """Raise FileNotFoundError when the dataset is not there."""
        if problem := self.source.missing():
            raise FileNotFoundError(problem)

    def episodes(self) -> Iterator[RecordedEpisode]:
        """The recorded episodes.

        Raises:
            ValueError: there is no such split, or the episodes cannot be replayed.
        """
        from openvla_lightning.data.images import decode

        for episode in islice(self.source.episodes(self.split), self.num_episodes):
            yield RecordedEpisode(episode, decode, self.source.folder)


def drive(env: Any, episode: RecordedEpisode, actions: NDArray[np.float64]) -> Replayed:
    """Reset the world to the episode's start and execute `actions` [T, D], until the episode ends."""
    observation, _ = env.reset(seed=episode.seed, options={"task": episode.task})
    images, proprio, success = [observation["image"]], [observation["proprio"]], False
    for action in actions:
        observation, _, terminated, truncated, info = env.step(action)
        success = bool(info["success"])
        if terminated or truncated:
            break
        images.append(observation["image"])
        proprio.append(observation["proprio"])
    return Replayed(images, np.stack(proprio), success)
