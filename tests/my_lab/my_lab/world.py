"""A world of the lab's own: a bright dot that moves with the hand."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from openvla_lightning.env.base import Task

SIZE = 48


class Dot(gymnasium.Env):
    """Carry the dot to one side of the board within `max_episode_steps`.

    Args:
        max_episode_steps: actions after which an episode has failed.
    """

    control_hz = 5.0
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (7,), np.float64)

    def __init__(self, max_episode_steps: int = 4) -> None:
        self.max_episode_steps = max_episode_steps

    @property
    def tasks(self) -> Mapping[str, Task]:
        """One task for each side."""
        return {f"go_{side}": Task(f"go_{side}", "go", f"go {side}", ("lab",)) for side in ("left", "right")}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Place the dot near the middle."""
        super().reset(seed=seed)
        task = self.tasks[(options or {})["task"]]
        self.goal = 1.0 if task.instruction.endswith("right") else 0.0
        self.place = float(self.np_random.uniform(0.4, 0.6))
        return self._observation(), {"instruction": task.instruction}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Move by the first number of the action, in metres."""
        self.place = float(np.clip(self.place + 10 * action[0], 0, 1))
        success = abs(self.place - self.goal) < 0.1
        return self._observation(), 0.0, success, False, {"success": success}

    def wait(self) -> tuple[dict, float, bool, bool, dict]:
        """Stand still."""
        return self.step(np.zeros(7))

    def _observation(self) -> dict[str, np.ndarray]:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        column = int(self.place * (SIZE - 5))
        image[20:25, column : column + 5] = 255
        return {"image": image}
