"""LIBERO's simulator as a Gymnasium environment."""

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np

from openvla_lightning.env.base import Task, checked_action
from openvla_lightning.env.libero.protocol import (
    CAMERA,
    CONTROL_HZ,
    NO_OP,
    REFERENCE_VERSIONS,
    RENDER_SIZE,
    SETTLING_STEPS,
    STEP_LIMITS,
    picture,
    to_simulator,
)
from openvla_lightning.env.libero.self_test import self_test


class Libero(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One suite of LIBERO under the paper's protocol.

    An action is seven numbers in the units of the `libero_*_no_noops` datasets: dx, dy, dz, droll, dpitch, dyaw as the
    arm's controller takes them (-1 to 1) and the gripper (1 open, 0 closed). An observation holds `image` uint8
    [image_size, image_size, 3]. An episode's seed is the number of the task's fixed initial state; the simulator adds
    none of its own randomness but a centimetre in where cabinets and stoves stand, which that number seeds, too.

    Args:
        suite: `libero_spatial`, `libero_object`, `libero_goal`, `libero_10` or `libero_90`.
        image_size: side of the pictures in pixels; 224 is what the released models look at.
        max_episode_steps: actions after which an episode has failed; None: the suite's own limit.
        assets: folder with LIBERO's meshes and textures; None: the installed package's own, which downloads them.

    Raises:
        ValueError: for an unknown suite.
        ImportError: when the extra is not installed, with the command that installs it.
        FileNotFoundError: when there are no meshes and textures.
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
    ) -> None:
        if suite not in STEP_LIMITS:
            raise ValueError(f"suite={suite!r} is unknown; choose one of {', '.join(STEP_LIMITS)}")
        self.suite, self.max_episode_steps = suite, max_episode_steps or STEP_LIMITS[suite]
        self._size = image_size
        self._load_package(assets)
        self._simulator: Any = None
        self.task: Task | None = None
        self._closed = False
        self._steps = 0
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float64)
        image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(image=image)  # type: ignore[assignment]

    def _load_package(self, assets: str | Path | None) -> None:
        if importlib.util.find_spec("libero") is None:
            raise ImportError(
                "env=libero_* needs LIBERO's simulator: pip install 'openvla-lightning[libero]', "
                "or in a checkout pip install -e '.[libero]'"
            )
        _answer_its_question()
        logging.getLogger("robosuite_logs").disabled = True  # about optional settings files
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import libero.libero as package
            from libero.libero import benchmark

            if assets is not None:
                package._assets_path_cache = str(Path(assets).resolve())
            found = Path(package.get_assets_path())
            self._benchmark = benchmark.get_benchmark(self.suite)()
        if not (found / "scenes").is_dir():
            raise FileNotFoundError(
                f"no LIBERO meshes and textures in {found}: they are downloaded from the Hugging Face hub when it can "
                "be reached (lerobot/libero-assets); without it, copy the folder `assets` of LIBERO's repository and "
                "say where it is with env.assets=/path/to/assets"
            )

    @cached_property
    def tasks(self) -> Mapping[str, Task]:
        """Every task by name, in the benchmark's order."""
        states = {index: len(self._benchmark.get_task_init_states(index)) for index in range(self._benchmark.n_tasks)}
        return {
            task.name: Task(task.name, self.suite, task.language, initial_states=states[index])
            for index, task in enumerate(self._benchmark.tasks)
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Put the task `options["task"]` into its initial state number `seed` and let it settle.

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
        self._simulator.seed(number)
        self._simulator.reset()
        states = self._benchmark.get_task_init_states(list(self.tasks).index(name))
        self._simulator.set_init_state(states[number])
        self._closed, self._steps = False, 0
        for _ in range(SETTLING_STEPS):
            rendered, *_ = self._simulator.step(list(NO_OP))
        return self._observe(rendered), self._info(success=False)

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
        """Let one control step pass: no motion, the gripper as last told."""
        return self._advance(np.array([*NO_OP[:6], 1.0 if self._closed else NO_OP[6]]))

    def _advance(self, robot: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        rendered, _, success, _ = self._simulator.step(robot)
        self._steps += 1
        truncated = not success and self._steps >= self.max_episode_steps
        return self._observe(rendered), float(success), bool(success), truncated, self._info(bool(success))

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
        """Where the point between the fingers is [3], m."""
        return self._simulator.sim.data.site_xpos[self._simulator.robots[0].eef_site_id].copy()

    def _build(self, task: Task) -> None:
        if self._simulator is not None and task == self.task:
            return
        self.close()
        from libero.libero.envs import OffScreenRenderEnv

        path = self._benchmark.get_task_bddl_file_path(list(self.tasks).index(task.name))
        self._simulator = OffScreenRenderEnv(
            bddl_file_name=path, camera_names=[CAMERA], camera_heights=RENDER_SIZE, camera_widths=RENDER_SIZE
        )
        self.task = task

    def _observe(self, rendered: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": picture(rendered[f"{CAMERA}_image"], self._size)}

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


def _answer_its_question() -> None:
    """Say where the package's own files are: at its first import it would ask on standard input."""
    home = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if (home / "config.yaml").is_file():
        return
    spec = importlib.util.find_spec("libero")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations))) / "libero"
    folders = {"benchmark_root": "", "bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
    lines = [f"{name}: {root / folder}" for name, folder in {**folders, "datasets": "../datasets"}.items()]
    home.mkdir(parents=True, exist_ok=True)
    unfinished = home / f".config.yaml.{os.getpid()}"
    unfinished.write_text("\n".join(lines) + "\n")
    unfinished.replace(home / "config.yaml")
