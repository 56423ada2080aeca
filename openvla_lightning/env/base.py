"""What a rollout needs of a world, and nothing more. A Gymnasium environment with `tasks` fits.

An environment is built by a picklable callable without arguments (a class, or a `functools.partial` of one) inside a
worker process. Its modules load no model, so a worker starts in a second.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class RequestError(ValueError):
    """Something was asked of an evaluation that cannot be; the message says what can. Other ValueErrors are faults."""


@contextmanager
def refusing() -> Iterator[None]:
    """Around what reads a user's checkpoint, options or data: a ValueError there is a RequestError."""
    try:
        yield
    except ValueError as error:
        raise RequestError(str(error)) from error


EVALUATION_SEEDS = range(1_000_000_000, 2_000_000_000)
"""Seeds an evaluation may use. Datasets are made from seeds below, so no evaluated scene was ever a demonstration."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing a robot can be told to do.

    Attributes:
        name: what `reset(options={"task": name})` takes, for example `lift_red_cube`.
        family: tasks reported together, for example `lift`.
        instruction: the words the policy reads, for example `lift the red cube`.
        sets: names of the task sets it belongs to, for example `pretraining`.
        initial_states: how many scenes the benchmark fixed for it; seeds then are 0 to this. None: any seed is a scene.
    """

    name: str
    family: str
    instruction: str
    sets: tuple[str, ...] = ()
    initial_states: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at before an evaluation: what, whether it is as it should be, and what was seen."""

    name: str
    ok: bool
    seen: str


class RolloutEnv(Protocol):
    """A world in which episodes are rolled out.

    An episode depends on its task and its seed alone, never on the episodes before it: the same pair gives the same
    scene, whichever process renders it. A world may have an attribute `looking`, True after a reset: while it is False,
    nobody sees what the world shows, and pictures need not be drawn.

    A class may have a static `tasks_of(**arguments)`, which says the same as `tasks` of a world that these arguments
    would build: what is asked of an evaluation is then checked before any world is.
    """

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Every task by name, in the order of a report."""

    @property
    def max_episode_steps(self) -> int:
        """Actions after which an episode counts as failed."""

    @property
    def control_hz(self) -> float:
        """Actions that the world executes in one second of its own time."""

    def reset(self, *, seed: int, options: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the episode of `options["task"]`; return an observation and an info.

        The observation holds `image`, uint8 [H, W, 3], the view `primary`; it may hold further views, `wrist_image` for
        one, and `proprio`, float32 [P], in the dataset's units. The info holds `instruction`.
        """

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute a float64 action [D] in the dataset's own units; return observation, reward, terminated, truncated
        and an info that holds `success`.

        The info may hold `progress`, 0 to 1: how much of the task is done, for partial credit.
        """

    def wait(self) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Let as much time pass as an action takes, without a new one; return what `step` does."""

    def self_test(self) -> list[Check]:
        """Look at whether actions and pictures mean what they should. Leaves the world between episodes."""

    def close(self) -> None:
        """Free the renderer."""


EnvFactory = Callable[[], RolloutEnv]


def world_of(env: Any) -> Any:
    """The class behind what `env=` builds: of a `functools.partial` or an instance, its class."""
    return getattr(env, "func", env if isinstance(env, type) else type(env))


def kind_of(env: Any) -> str:
    """How what `env=` builds is evaluated; the names are those of `run.evaluate.EVALUATIONS`.

    A class says so with its attribute `kind`. One that says nothing is a world, in which episodes are rolled out.
    """
    return getattr(world_of(env), "kind", "rollouts")


def checked_action(action: np.ndarray) -> np.ndarray:
    """The action as float64 [7].

    Raises:
        ValueError: it does not hold seven finite numbers.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (7,) or not np.isfinite(action).all():
        raise ValueError(f"an action is seven finite numbers (dx dy dz droll dpitch dyaw gripper), got {action!r}")
    return action
