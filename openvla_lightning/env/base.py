"""The interface of a world for rollouts: a Gymnasium environment with `tasks`.

An environment is built by a picklable callable without arguments (a class, or a `functools.partial` of one) inside a
worker process. Its modules load no model, so a worker starts in a second.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class RequestError(ValueError):
    """A request that an evaluation cannot fulfil; the message says what is possible. Other ValueErrors are bugs."""


@contextmanager
def refusing() -> Iterator[None]:
    """For code that reads a user's checkpoint, options or data: a ValueError inside becomes a RequestError."""
    try:
        yield
    except ValueError as error:
        raise RequestError(str(error)) from error


EVALUATION_SEEDS = range(1_000_000_000, 2_000_000_000)
"""Seeds of evaluations. Datasets use smaller seeds, so no evaluated scene is in a demonstration."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task for a robot.

    Attributes:
        name: the name for `reset(options={"task": name})`, for example `lift_red_cube`.
        family: tasks that are reported together, for example `lift`.
        instruction: the policy's instruction, for example `lift the red cube`.
        sets: names of the task sets it belongs to, for example `pretraining`.
        initial_states: number of the benchmark's fixed scenes, whose seeds count from 0. None: any seed is a scene.
    """

    name: str
    family: str
    instruction: str
    sets: tuple[str, ...] = ()
    initial_states: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a self-test: its name, whether it passed, and the observation."""

    name: str
    ok: bool
    seen: str


class RolloutEnv(Protocol):
    """A world for rollouts.

    An episode depends only on its task and its seed, never on earlier episodes: the same pair gives the same
    scene in every process. A world may have an attribute `looking`, which is True after a reset: while it is False,
    pictures are not used and need not be rendered.

    A class may have a static method `tasks_of(**arguments)`, which returns the `tasks` of a world with these
    arguments. Then an evaluation's settings are checked before any world is built. `keys_of(**arguments)` returns the
    keys of an observation of such a world; a policy that needs others is then refused before. `notes_of(**arguments)`
    returns sentences that are printed with the results and kept in them: what such a world leaves out.
    """

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All tasks by name, in the order of a report."""

    @property
    def max_episode_steps(self) -> int:
        """Actions after which an episode counts as failed."""

    @property
    def control_hz(self) -> float:
        """Control steps per second of the world's own time."""

    def reset(self, *, seed: int, options: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the episode of `options["task"]`; return an observation and an info.

        The observation holds `image`, uint8 [H, W, 3], the view `primary`. It may hold further views such as
        `wrist_image`, and `proprio`, float32 [P], in the dataset's units. The info holds `instruction`.
        """

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute a float64 action [D] in the dataset's own units; return observation, reward, terminated, truncated
        and an info that holds `success`.

        The info may hold `progress`, the completed share of the task from 0 to 1, for partial credit.
        """

    def wait(self) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Let one control step pass without a new action; return the same as `step`."""

    def self_test(self) -> list[Check]:
        """Check that actions and pictures are as they should be. Afterwards, a new episode must be started."""

    def close(self) -> None:
        """Free the renderer."""


EnvFactory = Callable[[], RolloutEnv]


def world_of(env: Any) -> Any:
    """The class of the object that `env=` builds: of a `functools.partial` or of an instance."""
    return getattr(env, "func", env if isinstance(env, type) else type(env))


def kind_of(env: Any) -> str:
    """The kind of evaluation of the object that `env=` builds: a key of `run.evaluate.EVALUATIONS`.

    It is the class's attribute `kind`; a class without it is a world for rollouts.
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
