"""LIBERO's simulator as a Gymnasium environment."""

import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.base import RequestError, Task, checked_action
from openvla_lightning.env.libero import engine
from openvla_lightning.env.libero.protocol import (
    CAMERA,
    CAMERAS,
    CONTROL_HZ,
    NO_OP,
    REFERENCE_VERSIONS,
    RENDER_SIZE,
    SETTLING_STEPS,
    STEP_LIMITS,
    VIEWS,
    picture,
    to_simulator,
    version_notes,
)
from openvla_lightning.env.libero.self_test import self_test
from openvla_lightning.env.libero.tasks import check_suite, listed, tasks_of


class Libero(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One suite of LIBERO, or of LIBERO-PRO, under the paper's protocol.

    An action is seven numbers in the units of the `libero_*_no_noops` datasets: dx, dy, dz, droll, dpitch, dyaw in the
    arm controller's units (-1 to 1) and the gripper (1 open, 0 closed). `views` and `proprio` choose the observation's
    entries: `image` and `wrist_image` uint8 [image_size, image_size, 3], `proprio` float32 [8]. An
    episode's seed is the number of the task's fixed initial state; the only randomness is about 1 cm in the position of
    cabinets and stoves, and the same number seeds it.

    Args:
        suite: `libero_spatial`, `libero_object`, `libero_goal`, `libero_10` or `libero_90`.
        image_size: side of the pictures in pixels; the released models use 224.
        max_episode_steps: actions after which an episode has failed; None: the suite's own limit.
        assets: folder with LIBERO's meshes and textures; None: those of the installed packages.
        perturbation: LIBERO-PRO's (Zhou et al. 2025) change of the suite's tasks: `object` changes the objects' looks,
            `swap` their places, `lan` the instruction, `task` the goal; None: no change, LIBERO itself.
        views: cameras to render, of `primary` (the key `image`) and `wrist` (`wrist_image`). Without views, episodes
            are the same, no OpenGL is needed, and a step takes a tenth of the time.
        proprio: whether an observation holds the robot's state, as in the released data: position (m) and axis-angle
            (rad) of the hand, two fingers (m).

    Raises:
        RequestError: for an unknown suite, perturbation or view.
        ImportError: the extra is not installed; the message has the command that installs it.
        FileNotFoundError: meshes or textures are missing; the message names them.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
    }
    control_hz = float(CONTROL_HZ)
    reference_versions: ClassVar[Mapping[str, str]] = REFERENCE_VERSIONS
    render_mode = "rgb_array"

    def __init__(
        self,
        suite: str,
        image_size: int = 224,
        max_episode_steps: int | None = None,
        assets: str | Path | None = None,
        perturbation: str | None = None,
        views: Sequence[str] = ("primary",),
        proprio: bool = False,
    ) -> None:
        check_suite(suite, perturbation)
        if unknown := sorted(set(views) - set(VIEWS)):
            raise RequestError(f"views={list(views)} holds {unknown[0]!r}; there are {', '.join(VIEWS)}")
        self.suite, self.max_episode_steps = suite, max_episode_steps or STEP_LIMITS[suite]
        self.perturbation = perturbation
        self._size, self._views, self._proprio = image_size, tuple(views), proprio
        self.assets = engine.find_assets(assets)
        self._benchmark = engine.load_benchmark(suite, perturbation, self.assets)
        self._simulator: Any = None
        self.task: Task | None = None
        self._closed = False
        self._steps = 0
        self.looking = True
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float64)
        image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        keys = self.keys_of(views, proprio)
        spaces: dict[str, gymnasium.Space[Any]] = {key: state if key == "proprio" else image for key in keys}
        self.observation_space = gymnasium.spaces.Dict(spaces)  # type: ignore[assignment]

    @staticmethod
    def keys_of(views: Sequence[str] = ("primary",), proprio: bool = False, **options: object) -> list[str]:
        """The keys of an observation of a world with these arguments; nothing is built."""
        return [*map(_key, views), *["proprio"] * proprio]

    @staticmethod
    def version_notes(found: Mapping[str, str]) -> list[str]:
        """Notes for results with these versions, package -> version."""
        return version_notes(found["mujoco"]) if "mujoco" in found else []

    @functools.cached_property
    def tasks(self) -> Mapping[str, Task]:
        """Every task by name, in the benchmark's order."""
        return listed(self._benchmark, self.suite, self.perturbation)

    tasks_of = staticmethod(tasks_of)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Set the task `options["task"]` to its initial state number `seed` and let the objects settle.

        Raises:
            ValueError: for a task that is not in the suite, or a number beyond its initial states.
        """
        super().reset(seed=seed)
        name = (options or {}).get("task") or next(iter(self.tasks))
        if name not in self.tasks:
            raise ValueError(f"task {name!r} is not in {self.suite}; it has {list(self.tasks)}")
        task = self.tasks[name]
        number = seed or 0
        if not 0 <= number < (task.initial_states or 0):
            raise ValueError(f"{name} has initial states 0 to {(task.initial_states or 0) - 1}, not {number}")
        self._build(task)
        self.looking = False
        self._simulator.seed(number)
        # LIBERO lengthens this list at every reset, and draws a number for each entry: an episode would depend on its
        # predecessors
        self._simulator.env.object_property_initializers.clear()
        self._simulator.reset()
        self._simulator.set_init_state(self._initial_states(task)[number])
        self._closed, self._steps = False, 0
        for step in range(SETTLING_STEPS):
            self.looking = step == SETTLING_STEPS - 1  # other pictures are not used
            seen, *_ = self._simulator.step(list(NO_OP))
        return self._observe(seen), self._info(success=False)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute an action [7]; reward 1 and termination at success.

        Raises:
            ValueError: if the action does not hold seven finite numbers.
        """
        action = checked_action(action)
        robot = to_simulator(action)
        self._closed = bool(robot[6] > 0)
        return self._advance(robot)

    def wait(self) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Let one control step pass without motion; the gripper keeps its last command."""
        return self._advance(np.array([*NO_OP[:6], 1.0 if self._closed else NO_OP[6]]))

    def _advance(self, robot: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        seen, _, success, _ = self._simulator.step(robot)
        self._steps += 1
        truncated = not success and self._steps >= self.max_episode_steps
        return self._observe(seen), float(success), bool(success), truncated, self._info(bool(success))

    self_test = self_test

    def close(self) -> None:
        """Free the simulator and its renderer."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None

    @property
    def simulator(self) -> Any:
        """LIBERO's own environment of the current task, after the first `reset`."""
        return self._simulator

    @property
    def gripper_position(self) -> np.ndarray:
        """Position of the point between the fingers [3], m."""
        return self._simulator.sim.data.site_xpos[self._simulator.robots[0].eef_site_id].copy()

    @property
    def fastest(self) -> float:
        """Largest speed of any free object along any axis, m/s."""
        model, velocity = self._simulator.sim.model, self._simulator.sim.data.qvel
        free = [model.jnt_dofadr[joint] for joint in range(model.njnt) if model.jnt_type[joint] == 0]
        return float(max((np.abs(velocity[first : first + 3]).max() for first in free), default=0.0))

    def expected_camera(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position [3] (m) and orientation [4] (w, x, y, z) that the agent view should have in the current task."""
        place, turn = CAMERAS[self._simulator.problem_name]
        return np.array(place), np.array(turn)

    def _task_file(self, task: Task) -> Path:
        return Path(self._benchmark.get_task_bddl_file_path(list(self.tasks).index(task.name)))

    def _initial_states(self, task: Task) -> NDArray[np.float64]:
        with engine.quietly():
            return self._benchmark.get_task_init_states(list(self.tasks).index(task.name))

    def _build(self, task: Task) -> None:
        if self._simulator is not None and task == self.task:
            return
        self.close()
        from libero.libero.envs.env_wrapper import ControlEnv

        cameras = [VIEWS[view] for view in self._views]
        try:
            self._simulator = ControlEnv(
                bddl_file_name=str(self._task_file(task)),
                use_camera_obs=bool(cameras),
                has_offscreen_renderer=bool(cameras),
                camera_names=cameras or [CAMERA],
                camera_heights=RENDER_SIZE,
                camera_widths=RENDER_SIZE,
            )
        except Exception as error:
            for note in self.version_notes({"mujoco": version("mujoco")}):
                error.add_note(note)
            raise
        self._draw_on_demand()
        self.task = task

    def _draw_on_demand(self) -> None:
        """Make the simulator's cameras return black while `looking` is False, because rendering takes most of a reset.

        The cameras stay the simulator's own, because robosuite renders 2 ms before the end of a step, as in the
        training data.
        """
        domain = self._simulator.env
        set_up, black = domain._setup_observables, np.zeros((RENDER_SIZE, RENDER_SIZE, 3), np.uint8)

        def set_up_gated() -> Any:
            draw = domain.sim.render
            domain.sim.render = lambda **view: draw(**view) if self.looking else black
            return set_up()

        domain._setup_observables = set_up_gated  # every reset makes a new `sim` and its cameras

    def _observe(self, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        observation: dict[str, np.ndarray] = {
            _key(view): picture(seen[f"{VIEWS[view]}_image"], self._size)
            if self.looking
            else np.zeros((self._size, self._size, 3), np.uint8)
            for view in self._views
        }
        if self._proprio:
            hand = seen["robot0_eef_pos"], _axis_angle(seen["robot0_eef_quat"])
            observation["proprio"] = np.concatenate([*hand, seen["robot0_gripper_qpos"]]).astype(np.float32)
        return observation

    def _info(self, success: bool) -> dict[str, Any]:
        assert self.task is not None
        domain = self._simulator.env
        goals = domain.parsed_problem["goal_state"]
        reached = sum(bool(domain._eval_predicate(goal)) for goal in goals)
        return {
            "instruction": self.task.instruction,
            "task": self.task.name,
            "success": success,
            "progress": reached / len(goals),
        }


def _key(view: str) -> str:
    """The observation's key of a view's picture."""
    return "image" if view == "primary" else f"{view}_image"


def _axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """(x, y, z, w) -> axis times angle, 0 to 2 pi [3], as robosuite's `quat2axisangle`."""
    length = float(np.linalg.norm(quaternion[:3]))
    return quaternion[:3] / max(length, 1e-9) * 2 * np.arctan2(length, quaternion[3])
