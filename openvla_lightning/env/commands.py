"""Commands to a world in a worker process, and its answers."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from openvla_lightning.env.base import RolloutEnv


@dataclass(frozen=True, slots=True)
class Start:
    """Start an episode."""

    task: str
    seed: int


@dataclass(frozen=True, slots=True)
class Move:
    """Execute an action [D], or none, and then let `waits` control steps pass.

    With `look` False, the picture afterwards is not used, so a world with `looking` need not render it.
    """

    action: np.ndarray | None
    waits: int = 0
    look: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """A slot's answer to a command.

    Attributes:
        seen: the policy's next observation: `image`, `<view>_image` uint8 [H, W, 3] and `proprio` [P]; None after an
            error.
        done: the episode is over; the next command must be a `Start`.
        success: whether the episode has succeeded so far.
        progress: completed share of the task, 0 to 1.
        steps: control steps that passed, waits included.
        instruction: the episode's own instruction, in the answer to a `Start`.
        error: traceback of the environment, or how its process died; the episode is lost.
        died: its process died, perhaps by the fault of another episode there.
        seconds: time that the world took.
    """

    seen: Mapping[str, np.ndarray] | None
    done: bool = False
    success: bool = False
    progress: float = 0.0
    steps: int = 0
    instruction: str = ""
    error: str | None = None
    died: bool = False
    seconds: float = 0.0


Command = Start | Move


def obey(env: RolloutEnv, command: Command) -> Outcome:
    """Execute a slot's command."""
    if isinstance(command, Start):
        try:
            observation, info = env.reset(seed=command.seed, options={"task": command.task})
        except Exception as error:
            error.add_note(f"while starting task {command.task!r} with seed {command.seed}")
            raise
        return Outcome(_shown(observation), instruction=info["instruction"])
    if hasattr(env, "looking"):
        env.looking = command.look
    for steps in range(1, command.waits + 2):
        first = steps == 1 and command.action is not None
        observation, _, terminated, truncated, info = env.step(command.action) if first else env.wait()  # type: ignore[arg-type]
        if terminated or truncated:
            break
    success, progress = bool(info["success"]), float(info.get("progress", info["success"]))
    return Outcome(_shown(observation), bool(terminated or truncated), success, progress, steps)


def _shown(observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The entries of an observation that a policy may use; a state without meaning ends the episode, not all."""
    if not np.isfinite(observation.get("proprio", 0.0)).all():
        raise ValueError(f"the world's proprio is not finite: {observation['proprio']!r}")
    return {name: value for name, value in observation.items() if name.endswith("image") or name == "proprio"}
