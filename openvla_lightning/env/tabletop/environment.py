"""The tabletop world as a Gymnasium environment."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import gymnasium
import numpy as np

from openvla_lightning.env.base import EVALUATION_SEEDS, checked_action
from openvla_lightning.env.orientation import pixel
from openvla_lightning.env.tabletop.embodiment import EMBODIMENTS
from openvla_lightning.env.tabletop.layout import choose, spots, strip
from openvla_lightning.env.tabletop.renderer import Renderer, mujoco
from openvla_lightning.env.tabletop.scene import FINGER_OPEN, OBJECTS, PLATES, REACH, Thing, mjcf
from openvla_lightning.env.tabletop.self_test import self_test
from openvla_lightning.env.tabletop.tasks import CUBES, DISHES, TabletopTask, judge, keys_of, tasks_of

TRAINING_SEEDS = range(EVALUATION_SEEDS.start)
"""Seeds of demonstrations: below every seed of an evaluation."""

_SHOULDER = np.array([-0.42, 0.0, 0.22])
_LINK = 0.34


class Tabletop(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """An arm with a parallel gripper over a table with coloured objects and plates.

    An action is seven numbers: dx, dy, dz, droll, dpitch, dyaw of the fingertips, in the embodiment's units and clipped
    to its limits, and the gripper (1 open, 0 closed). An observation holds `image` uint8 [H, W, 3] from a camera that
    faces the robot, with `wrist_camera` also `wrist_image` of the same shape, and `proprio` float32 [7]: x, y, z (m),
    roll, pitch, yaw (rad), gripper opening (0 to 1). The info holds `instruction` and `success`. An episode depends
    only on its seed and its task.

    Args:
        tasks: names, families or sets (`pretraining`, `new`) of tasks, or patterns of them (`lift_*`).
        objects: objects of the world, for example `yellow can`; each episode shows some of them.
        plates: plates of the world.
        objects_per_scene: number of objects in an episode, the task's own included; default all of `objects`.
        plates_per_scene: number of plates; default all of `plates`.
        embodiment: `metric` or `relative`: the units, limits and duration of an action.
        image_size: side of the square pictures, in pixels.
        tidy: an easier world: each object stays in its own strip of the table, in the order of `objects` from left to
            right, no object is rotated, and the hand starts upright.
        wrist_camera: also render the wrist camera, which doubles the cost.
        phrasing: `varied` uses one of several instructions per task, `canonical` always the first.
        tolerance: scale of the tolerated error; 1 is generous, 0.6 strict.
        max_episode_steps: actions after which an episode has failed.

    Raises:
        ValueError: if a name is not in the world, or the scene has no room for all objects.
        RuntimeError: at the first picture, if this machine has no OpenGL renderer.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": 10,
    }

    def __init__(
        self,
        tasks: Iterable[str] = ("*",),
        objects: Iterable[str] = CUBES,
        plates: Iterable[str] = DISHES,
        objects_per_scene: int | None = None,
        plates_per_scene: int | None = None,
        embodiment: str = "metric",
        image_size: int = 96,
        tidy: bool = False,
        wrist_camera: bool = False,
        phrasing: str = "varied",
        tolerance: float = 1.0,
        max_episode_steps: int = 50,
        render_mode: str | None = "rgb_array",
    ) -> None:
        objects, plates = list(objects), list(plates)
        self._tasks = tasks_of(tasks, objects, plates)
        if embodiment not in EMBODIMENTS:
            raise ValueError(f"embodiment={embodiment!r} is unknown; choose one of {list(EMBODIMENTS)}")
        if phrasing not in ("varied", "canonical"):
            raise ValueError(f"phrasing={phrasing!r} is unknown; choose 'varied' or 'canonical'")
        self.embodiment = EMBODIMENTS[embodiment]
        self.max_episode_steps = max_episode_steps
        self.render_mode = render_mode
        self._objects, self._plates = [OBJECTS[name] for name in objects], [PLATES[name] for name in plates]
        self._counts = (
            objects_per_scene or len(objects),
            len(plates) if plates_per_scene is None else plates_per_scene,
        )
        if self._counts[0] > len(objects) or self._counts[1] > len(plates):
            raise ValueError(
                f"{self._counts} objects and plates per scene, but the world has {len(objects)} and {len(plates)}"
            )
        self._size, self._wrist, self._tidy = image_size, wrist_camera, tidy
        self._varied, self._tolerance = phrasing == "varied", tolerance
        self._model = mujoco.MjModel.from_xml_string(mjcf())
        self._data = mujoco.MjData(self._model)
        self._renderer: Renderer | None = None
        self._bodies = {t.body: self._model.body(t.body).id for t in [*OBJECTS.values(), *PLATES.values()]}
        self._owner = {i: name for name, i in self._bodies.items()}
        self._gripper = [self._model.geom(name).id for name in ("palm", "left_finger", "right_finger")]
        self.task: TabletopTask = next(iter(self._tasks.values()))
        self.action_space = gymnasium.spaces.Box(self.embodiment.low, self.embodiment.high, dtype=np.float64)
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        spaces: dict[str, gymnasium.Space[Any]] = {
            "image": picture,
            "proprio": gymnasium.spaces.Box(-np.inf, np.inf, (7,), np.float32),
        }
        if wrist_camera:
            spaces["wrist_image"] = picture
        self.observation_space = gymnasium.spaces.Dict(spaces)  # type: ignore[assignment]

    @property
    def tasks(self) -> Mapping[str, TabletopTask]:
        """All tasks by name."""
        return self._tasks

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Lay out a new scene; `options={"task": name}` chooses the task, otherwise the seed does.

        Raises:
            ValueError: if the task is not one of `tasks`.
        """
        super().reset(seed=seed)
        name = (options or {}).get("task") or list(self._tasks)[int(self.np_random.integers(len(self._tasks)))]
        if name not in self._tasks:
            raise ValueError(f"task {name!r} is not in this world; it has {list(self._tasks)}")
        self.task = self._tasks[name]
        variants = self.task.variants
        self.instruction = variants[int(self.np_random.integers(len(variants)))] if self._varied else variants[0]
        self._lay_out()
        self._steps = 0
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute an action [7]; reward 1 and termination at success, termination when success is impossible.

        Raises:
            ValueError: if the action does not hold seven finite numbers.
        """
        action = checked_action(action)
        metric = self.embodiment.to_metric(action)
        control = self._data.ctrl
        control[:3] = np.clip(self.hand_position + metric[:3], REACH[0], REACH[1])
        control[3:6] = np.clip(self.hand_rotation + metric[3:6], -0.9, 0.9)
        control[6] = FINGER_OPEN if metric[6] > 0.5 else 0.0
        return self.wait()

    def wait(self) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Let one control step pass; the hand continues to its last target."""
        mujoco.mj_step(self._model, self._data, nstep=self.embodiment.substeps)
        self._pose_arm()
        self._steps += 1
        outcome = judge(self.task, self._start, self._positions(), self.touched(), self._tolerance)
        success, terminated = outcome.success and not outcome.failure, outcome.success or outcome.failure
        truncated = not terminated and self._steps >= self.max_episode_steps
        return self._observe(), float(success), terminated, truncated, self._info(success, outcome.progress)

    @property
    def control_hz(self) -> float:
        """Actions in one second of the world's time."""
        return 1.0 / (self.embodiment.substeps * self._model.opt.timestep)

    self_test = self_test
    tasks_of, keys_of = staticmethod(tasks_of), staticmethod(keys_of)

    def render(self) -> np.ndarray:
        """Return the picture of the camera that faces the robot, uint8 [H, W, 3]."""
        return self._picture("agent")

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # State of the world for the expert and the judge.

    @property
    def objects(self) -> list[Thing]:
        """The objects on the table now."""
        return [thing for thing in self._objects if thing.body in self._visible]

    @property
    def hand_position(self) -> np.ndarray:
        """Position of the fingertips [3], m."""
        return self._data.qpos[:3].copy()

    def hand_pixel(self) -> np.ndarray:
        """Row and column [2] of the fingertips in the picture, 0 to 1."""
        camera = self._data.camera("agent")
        return pixel(self.hand_position, camera.xpos, camera.xmat, self._model.camera("agent").fovy[0], mirrored=False)

    @property
    def hand_rotation(self) -> np.ndarray:
        """Roll, pitch and yaw of the hand [3], rad."""
        return self._data.qpos[[5, 4, 3]]

    @property
    def opening(self) -> float:
        """Opening of the gripper, 0 to 1."""
        return float(np.clip(self._data.qpos[7] / FINGER_OPEN, 0.0, 1.0))

    def position(self, thing: Thing) -> np.ndarray:
        """Position of a thing's centre [3], m."""
        return self._data.xpos[self._bodies[thing.body]].copy()

    def yaw(self, thing: Thing) -> float:
        """Rotation of a thing about the vertical, rad."""
        matrix = self._data.xmat[self._bodies[thing.body]]
        return float(np.arctan2(matrix[3], matrix[0]))

    def touched(self, geoms: Iterable[int] | None = None) -> set[str]:
        """Names of the bodies that the gripper (or these geoms of it) is in contact with."""
        mine, pairs = set(self._gripper if geoms is None else geoms), self._data.contact.geom
        bodies = self._model.geom_bodyid
        return {
            self._owner[bodies[theirs]]
            for a, b in pairs
            for ours, theirs in ((a, b), (b, a))
            if ours in mine and bodies[theirs] in self._owner
        }

    def holding(self, thing: Thing) -> bool:
        """Whether both fingers touch a thing."""
        return all(thing.body in self.touched([finger]) for finger in self._gripper[1:])

    def _lay_out(self) -> None:
        model, data, random = self._model, self._data, self.np_random
        mujoco.mj_resetData(model, data)
        task = self.task
        plates = choose(random, self._plates, task.plate, self._counts[1])
        things = choose(random, self._objects, task.target, self._counts[0])
        for name, body in self._bodies.items():
            self._place(name, np.array([0.3 * body, 0.0, -5.0]), 0.0)
            model.body_gravcomp[body] = 1.0
        turn = 0.0 if self._tidy else 0.3
        where = partial(strip, self._objects if self._tidy else [])
        for thing, spot in zip([*plates, *things], spots(random, [*plates, *things], where), strict=True):
            self._place(thing.body, np.array([*spot, thing.height / 2]), random.uniform(-turn, turn))
            model.body_gravcomp[self._bodies[thing.body]] = 0.0
        self._visible = [thing.body for thing in [*plates, *things]]
        data.qpos[:3] = random.uniform((-0.10, -0.16, 0.11), (0.10, 0.16, 0.19))
        data.qpos[3:6] = random.uniform(-turn / 2, turn / 2, 3)
        data.qpos[6:8] = FINGER_OPEN * random.integers(2)
        data.ctrl[:] = [*data.qpos[:3], *self.hand_rotation, data.qpos[7]]
        mujoco.mj_forward(model, data)
        self._pose_arm()
        self._start = self._positions()

    def _place(self, body: str, position: np.ndarray, yaw: float) -> None:
        index = self._bodies[body]
        if self._model.body_dofnum[index]:
            address = self._model.jnt_qposadr[self._model.body_jntadr[index]]
            self._data.qpos[address : address + 7] = [*position, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        else:
            self._model.body_pos[index] = position

    def _pose_arm(self) -> None:
        """Draw the two links from the shoulder to the wrist, and the mark on the table under the fingertips."""
        wrist = self._data.body("hand").xpos + 0.15 * self._data.body("hand").xmat.reshape(3, 3)[:, 2]
        span = wrist - _SHOULDER
        reach = float(np.linalg.norm(span))
        bend = np.sqrt(max(_LINK**2 - (reach / 2) ** 2, 0.0))
        side = np.cross(span, (0.0, 0.0, 1.0))
        upward = np.cross(side, span) / (np.linalg.norm(np.cross(side, span)) + 1e-9)
        elbow = _SHOULDER + span / 2 + upward * bend
        for name, start, end in (("upper_arm", _SHOULDER, elbow), ("forearm", elbow, wrist)):
            slot = self._model.body(name).mocapid[0]
            self._data.mocap_pos[slot] = (start + end) / 2
            quat = np.empty(4)
            mujoco.mju_quatZ2Vec(quat, end - start)
            self._data.mocap_quat[slot] = quat
        below = self._model.body("drop_point").mocapid[0]
        self._data.mocap_pos[below] = [*self._data.qpos[:2], 0.001]

    def _positions(self) -> dict[str, np.ndarray]:
        return {name: self._data.xpos[self._bodies[name]].copy() for name in self._visible}

    def _picture(self, camera: str) -> np.ndarray:
        if self._renderer is None:
            self._renderer = Renderer(self._model, self._size)
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        return self._renderer.render(self._data, camera)

    def _observe(self) -> dict[str, np.ndarray]:
        pose = np.array([*self.hand_position, *self.hand_rotation, self.opening], np.float32)
        observation = {"image": self._picture("agent"), "proprio": pose}
        if self._wrist:
            observation["wrist_image"] = self._picture("wrist")
        return observation

    def _info(self, success: bool = False, progress: float = 0.0) -> dict[str, Any]:
        done = {"success": success, "progress": 1.0 if success else progress}
        return {"instruction": self.instruction, "task": self.task.name, **done}
