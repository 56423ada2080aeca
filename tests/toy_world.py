"""A small real Gymnasium world for rollouts: a dot on a board is told which corner to go to.

Environment processes import this module, which is why it needs little: the modules of tests need torch.
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from openvla_lightning.env.base import Check, Task
from openvla_lightning.evaluation.plan import plan_episodes

CORNERS = {"red": (0.0, 0.0), "green": (0.0, 1.0), "blue": (1.0, 0.0), "yellow": (1.0, 1.0)}
SIZE = 32


class ToyWorld(gymnasium.Env):
    """Reach the corner within `max_episode_steps`. `fail_at`: raise at that step; `unlucky`: never succeed there."""

    max_episode_steps = 20
    control_hz = 10.0
    action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float64)
    observation_space = gymnasium.spaces.Dict(image=gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8))

    def __init__(self, fail_at: int | None = None, broken: bool = False) -> None:
        if broken:
            raise RuntimeError("no renderer here")
        self.fail_at = fail_at

    @property
    def tasks(self) -> Mapping[str, Task]:
        """One task per corner."""
        names = [f"go_{colour}" for colour in CORNERS]
        return {
            name: Task(name, "top" if CORNERS[colour][0] == 0 else "bottom", f"go to the {colour} corner", ("corners",))
            for name, colour in zip(names, CORNERS, strict=True)
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Place the dot near the middle."""
        super().reset(seed=seed)
        task = self.tasks[(options or {})["task"]]
        self.target = np.array(CORNERS[task.instruction.split()[3]])
        self.place = self.np_random.uniform(0.3, 0.7, 2)
        self.taken = 0
        return self._observation(), {"instruction": task.instruction}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Move by the first two dimensions, jittered by the episode's own noise."""
        return self._move(action[:2])

    def wait(self) -> tuple[dict, float, bool, bool, dict]:
        """Stand still, shaking."""
        return self._move(np.zeros(2))

    def _move(self, by: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.taken += 1
        if self.taken == self.fail_at:
            raise RuntimeError("the motor burnt out")
        self.place = np.clip(self.place + by + self.np_random.normal(0, 0.02, 2), 0, 1)
        success = bool(np.abs(self.place - self.target).max() < 0.1)
        return self._observation(), 0.0, success, False, {"success": success}

    def _observation(self) -> dict[str, np.ndarray]:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        row, column = (self.place * (SIZE - 1)).astype(int)
        image[row, column] = 255
        return {"image": image}


class Unlucky(ToyWorld):
    """Cannot start the task `go_red`."""

    def reset(self, *, seed=None, options=None):
        if (options or {})["task"] == "go_red":
            raise RuntimeError("out of red")
        return super().reset(seed=seed, options=options)


class Suspect(ToyWorld):
    """Knows that something is wrong with it."""

    reference_versions = {"mujoco": "1.0"}  # noqa: RUF012

    def self_test(self):
        return [Check("renders", True, "fine"), Check("action x", False, "moved 0 cm")]


class Incomplete(ToyWorld):
    """Has tasks that it leaves out, and says so."""

    @staticmethod
    def notes_of(fail_at: int | None = None, **options: object) -> list[str]:
        return [f"2 of 6 corners are left out, with fail_at={fail_at}"]


class Seeing(ToyWorld):
    """Shows the board from behind, too, and tells where the dot is and how many steps were taken."""

    def _observation(self) -> dict[str, np.ndarray]:
        seen = super()._observation()
        state = np.array([*self.place, self.taken], np.float32)
        return seen | {"wrist_image": seen["image"][::-1].copy(), "proprio": state, "secret": np.zeros(3)}


class Blind(ToyWorld):
    """Draws only where someone looks."""

    looking = True

    def reset(self, *, seed=None, options=None):
        self.looking = True
        return super().reset(seed=seed, options=options)

    def _observation(self):
        seen = super()._observation()
        return seen if self.looking else {name: value * 0 for name, value in seen.items()}


DOOMED = plan_episodes(ToyWorld().tasks.values(), 3)[4].seed
"""The initial state at which the next four worlds fail."""


class Doomed(ToyWorld):
    """Meets its end at one initial state."""

    def reset(self, *, seed, options):
        if seed == DOOMED:
            self.end()
        return super().reset(seed=seed, options=options)


class Fragile(Doomed):
    """Breaks down there."""

    def end(self):
        raise RuntimeError("the motor burnt out")


class Lost(Doomed):
    """Does not know where it is from there on."""

    def end(self):
        self.lost = True

    def _observation(self):
        return super()._observation() | {"proprio": np.full(3, np.nan if hasattr(self, "lost") else 0.0)}


class Deadly(Doomed):
    """Kills its process there."""

    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Doomed):
    """Never answers from there on."""

    def end(self):
        time.sleep(1000)


class AlwaysDeadly(ToyWorld):
    """Kills its process in every episode."""

    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


class OnceFragile(ToyWorld):
    """Its first episode in each process breaks down."""

    def step(self, action):
        if not getattr(ToyWorld, "warm", False):
            ToyWorld.warm = True
            raise RuntimeError("cold")
        return super().step(action)


class Walker:
    """Reads the dot's place off the image and walks to the corner it is told; counts its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def act(self, image: Sequence[np.ndarray], instruction: Sequence[str]) -> np.ndarray:
        """Actions [B, 7]."""
        self.batches.append(len(image))
        actions = np.zeros((len(image), 7))
        for index, (picture, words) in enumerate(zip(image, instruction, strict=True)):
            place = np.argwhere(picture[..., 0] == 255)[0] / (SIZE - 1)
            actions[index, :2] = np.clip(np.array(CORNERS[words.split()[3]]) - place, -0.1, 0.1)
        return actions
