"""SimplerEnv as a Gymnasium environment."""

import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np

from openvla_lightning.data.images import resize
from openvla_lightning.env.base import Task, checked_action
from openvla_lightning.env.simpler.robots import ROBOTS, Gripper, Robot, to_controller


class Simpler(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One robot's tasks, with pictures matched to the real ones ("visual matching").

    An action is seven numbers in the units of `bridge_orig` (WidowX) or `fractal20220817_data` (Google robot): dx, dy,
    dz (m), droll, dpitch, dyaw (rad) and the gripper (1 open, 0 closed). An observation holds `image` uint8
    [image_size, image_size, 3] from the camera of the robot's dataset.

    Args:
        robot: `widowx` or `google_robot`.
        image_size: side of the pictures in pixels.
        max_episode_steps: actions after which an episode has failed; None: the robot's own limit.

    Raises:
        ValueError: for an unknown robot.
        ImportError: SimplerEnv is not installed; the message says where to get it.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # type: ignore[misc]
    render_mode = "rgb_array"

    def __init__(self, robot: str, image_size: int = 224, max_episode_steps: int | None = None) -> None:
        self._robot, self._size = _robot(robot), image_size
        if importlib.util.find_spec("simpler_env") is None:
            raise ImportError(
                "env=simpler_* needs SimplerEnv, which is installed from its repository "
                "(https://github.com/simpler-env/SimplerEnv) and draws with Vulkan"
            )
        self.max_episode_steps = max_episode_steps or self._robot.step_limit
        self.control_hz = self._robot.control_hz
        self._simulator: Any = None
        self._gripper: Gripper = self._robot.gripper()
        self._task = ""
        self._steps = 0
        self._opening = 1.0
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (7,), np.float64)
        image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(image=image)  # type: ignore[assignment]

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All tasks by name; the exact instruction is known when an episode begins."""
        return _tasks(self._robot)

    @staticmethod
    def tasks_of(robot: str, **options: object) -> Mapping[str, Task]:
        """The tasks of a world with these arguments; nothing is built.

        Raises:
            ValueError: for an unknown robot.
        """
        return _tasks(_robot(robot))

    @staticmethod
    def keys_of(**options: object) -> list[str]:
        """The keys of an observation of any such world."""
        return ["image"]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode of `options["task"]` from initial state `seed`.

        Raises:
            ValueError: for a task that the robot does not have.
        """
        import simpler_env

        super().reset(seed=seed)
        name = (options or {}).get("task") or self._robot.tasks[0]
        if name not in self._robot.tasks:
            raise ValueError(f"task {name!r} is not one of {', '.join(self._robot.tasks)}")
        if name != self._task:
            self.close()
            self._simulator, self._task = simpler_env.make(name), name
        start = {"obj_init_options": {"episode_id": seed or 0}} if self._robot.episodes else {}
        observation, _ = self._simulator.reset(seed=seed, options=start)
        self._gripper, self._steps, self._opening = self._robot.gripper(), 0, 1.0
        return self._observe(observation), self._info(success=False)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute an action [7]; reward 1 and termination at success.

        Raises:
            ValueError: if the action does not hold seven finite numbers.
        """
        action = checked_action(action)
        self._opening = float(action[6])
        observation, _, success, truncated, _ = self._simulator.step(to_controller(action, self._gripper))
        self._steps += 1
        late = bool(truncated) or self._steps >= self.max_episode_steps
        done = bool(success)
        return self._observe(observation), float(done), done, late and not done, self._info(done)

    def wait(self) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Let one control step pass without motion; the gripper keeps its last command."""
        return self.step(np.array([*np.zeros(6), self._opening]))

    def close(self) -> None:
        """Free the simulator."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator, self._task = None, ""

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        from simpler_env.utils.env.observation_utils import get_image_from_maniskill2_obs_dict

        rendered = np.ascontiguousarray(get_image_from_maniskill2_obs_dict(self._simulator, observation))
        return {"image": resize(rendered, self._size)}

    def _info(self, success: bool) -> dict[str, Any]:
        words = self._simulator.get_language_instruction()  # it changes with the parts of a long task
        return {"instruction": words, "task": self._task, "success": success}


def _robot(name: str) -> Robot:
    if name not in ROBOTS:
        raise ValueError(f"robot={name!r} is unknown; choose one of {', '.join(ROBOTS)}")
    return ROBOTS[name]


def _tasks(robot: Robot) -> Mapping[str, Task]:
    words = {name: name.split("_", 1 if name.startswith("widowx") else 2)[-1] for name in robot.tasks}
    return {
        name: Task(name, "simpler", said.replace("_", " "), initial_states=robot.episodes)
        for name, said in words.items()
    }
