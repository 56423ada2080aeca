"""Recorded episodes driven through the world they were recorded in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.base import EnvFactory


class Recorded:
    """A recorded episode: where it began, what was done, and what was seen.

    Attributes:
        task, seed: what `reset` takes.
        executed: float64 [T, D], what the world was told, in the dataset's units.
        images: uint8 [H, W, 3] at each step.
        proprio: float32 [T, P].
    """

    def __init__(self, episode: dict[str, Any], decode: Callable[[bytes], NDArray[np.uint8]], where: Path) -> None:
        about, steps = episode.get("episode_metadata", {}), episode["steps"]
        if absent := [name for name in ("task", "seed") if name not in about]:
            raise ValueError(
                f"the episodes of {where} do not say where they began (episode_metadata/{', '.join(absent)}), so no "
                "simulator can be set up as they were. What can be compared without one: env=open_loop, and the data "
                "report, which holds actions against recorded motion"
            )
        if "executed_action" not in steps:
            raise ValueError(
                f"{where} holds what the expert meant to do and not what was executed: it was made by an earlier "
                f"version. Remove {where.parent} and run again"
            )
        self.task, self.seed = about["task"].decode(), int(about["seed"])
        self.executed = np.asarray(steps["executed_action"], np.float64)
        self.images = [decode(bytes(image)) for image in steps["observation"]["image"]]
        self.proprio = np.asarray(steps["observation"]["proprio"], np.float32)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of one episode: every picture [H, W, 3] and proprio [P] that was seen, and the judgement."""

    images: list[NDArray[np.uint8]]
    proprio: NDArray[np.float32]
    success: bool


class Replay:
    """The world and the episodes of one dataset that says where each began.

    Args:
        world: builds the world, with the robot of the dataset.
        source: builds the dataset's source when called with `name`.
        dataset: its name.
        split: which of its splits.
        num_episodes: how many of them, from the first on.
    """

    def __init__(
        self,
        world: EnvFactory,
        source: Callable[..., Any],
        dataset: str,
        split: str = "val",
        num_episodes: int = 20,
    ) -> None:
        if num_episodes < 1:
            raise ValueError(f"num_episodes must be at least 1, got {num_episodes}")
        self.world, self.dataset, self.split, self.num_episodes = world, dataset, split, num_episodes
        self.source = source(name=dataset)

    def check(self) -> None:
        """Raise FileNotFoundError when the dataset is not there."""
        if problem := self.source.missing():
            raise FileNotFoundError(problem)

    def episodes(self) -> Iterator[Recorded]:
        """The recorded episodes.

        Raises:
            ValueError: there is no such split, or the episodes cannot be replayed.
        """
        from openvla_lightning.data.images import decode

        for episode in islice(self.source.episodes(self.split), self.num_episodes):
            yield Recorded(episode, decode, self.source.folder)


def drive(env: Any, episode: Recorded, actions: NDArray[np.float64]) -> Replayed:
    """Set the world up as it was and do `actions` [T, D], to the end of the episode."""
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
