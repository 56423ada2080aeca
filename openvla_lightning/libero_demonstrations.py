"""Scripted LIBERO demonstrations in the layout of the released `libero_object_no_noops`, where that cannot be had.

    python -m openvla_lightning.libero_demonstrations data/libero_object_no_noops/1.0.0

Of one task. Initial states 0 to 9, which `evaluate.py episodes_per_task=10` begins with, are left out. The hand is
pushed off its way at random and the correction recorded: a policy that has seen the straight way alone cannot come back
to it.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.source.writer import write_rlds
from openvla_lightning.env.libero import Libero
from openvla_lightning.env.libero.expert import GRASPS, Expert
from openvla_lightning.env.libero.protocol import RENDER_SIZE, picture

STATES = {"train": range(14, 50), "val": range(10, 14)}
WRIST_CAMERA = "robot0_eye_in_hand"
ATTEMPTS = 5
TRAVELLING = (0, 1, 3, 4)
"""Stages of the expert in which a push does no harm."""
PUSHED_FOR = 12
"""Steps."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A picklable `(split, index) -> episode`.

    Attributes:
        suite: one that the expert knows.
        task: its number.
        pushes: standard deviation of what is added to half of the moves, where 1 is the fastest move.
    """

    suite: str
    task: int
    pushes: float

    def __call__(self, split: str, index: int) -> dict[str, Any]:
        """Record an initial state; once more with other pushes where the expert failed.

        Raises:
            RuntimeError: when it fails again and again.
        """
        state = STATES[split][index]
        for attempt in range(ATTEMPTS):
            steps = self._attempt(state, np.random.default_rng((self.task, state, attempt)))
            if steps is not None:
                return {"steps": steps}
        raise RuntimeError(f"{self.suite}, task {self.task}: the expert does not solve initial state {state}")

    def _attempt(self, state: int, random: np.random.Generator) -> list[dict[str, Any]] | None:
        env = _environment(self.suite)
        seen, info = env.reset(seed=state, options={"task": list(env.tasks)[self.task]})
        expert, push = Expert(env), np.zeros(3)
        steps: list[dict[str, Any]] = []
        while True:
            if random.random() < 1 / PUSHED_FOR:
                push = random.normal(size=3) * self.pushes * (random.random() < 0.5)
            action = expert.act()
            recorded = action.astype(np.float32)
            recorded[6] = 1 - 2 * recorded[6]  # LIBERO's, which the released data has: -1 open, 1 closed
            observation = _observe(env, seen["image"])
            steps.append({"observation": observation, "action": recorded, "language_instruction": info["instruction"]})
            if expert.stage in TRAVELLING:
                action[:3] = np.clip(action[:3] + push, -1, 1)
            seen, _, success, truncated, info = env.step(action)
            if success or truncated:
                return steps if success else None


def _observe(env: Libero, image: NDArray[np.uint8]) -> dict[str, Any]:
    data = env.simulator.sim.data
    wrist = env.simulator.sim.render(camera_name=WRIST_CAMERA, width=RENDER_SIZE, height=RENDER_SIZE)
    robot = env.simulator.robots[0]
    fingers = [data.qpos[joint] for joint in robot._ref_gripper_joint_pos_indexes]
    quaternion = data.get_body_xquat(robot.robot_model.eef_name)
    state = [*env.gripper_position, *_axis_angle(quaternion), *fingers]
    return {"image": image, "wrist_image": picture(wrist, RENDER_SIZE), "state": np.array(state, np.float32)}


def _axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """(w, x, y, z) -> axis times angle [3]."""
    axis = quaternion[1:]
    length = float(np.linalg.norm(axis))
    return axis / max(length, 1e-9) * 2 * np.arctan2(length, quaternion[0])


@cache
def _environment(suite: str) -> Libero:
    """That of this process: building one takes seconds."""
    return Libero(suite, RENDER_SIZE, assets=os.environ.get("LIBERO_ASSETS"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the dataset; go on where an interrupted run stopped."""
    import tensorflow_datasets as tfds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="<root>/<dataset>/<version>")
    parser.add_argument("--suite", choices=sorted(GRASPS), default="libero_object")
    parser.add_argument("--task", type=int, default=0, help="its number in the suite")
    parser.add_argument("--pushes", type=float, default=0.5, help="how hard, 1 being the fastest move")
    parser.add_argument("--workers", type=int, default=None, help="processes; one per core")
    given = parser.parse_args(arguments)
    features = tfds.features
    image = features.Image(shape=(RENDER_SIZE, RENDER_SIZE, 3), encoding_format="jpeg")
    observation = {"image": image, "wrist_image": image, "state": features.Tensor(shape=(8,), dtype=np.float32)}
    step = {
        "observation": features.FeaturesDict(observation),
        "action": features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": features.Text(),
    }
    write_rlds(
        given.folder,
        features.FeaturesDict({"steps": features.Dataset(step)}),
        {split: len(states) for split, states in STATES.items()},
        Demonstration(given.suite, given.task, given.pushes),
        episodes_per_shard=4,
        workers=given.workers,
        recipe={"suite": given.suite, "task": given.task, "pushes": given.pushes},
        description="Demonstrations of a scripted expert in LIBERO",
    )


if __name__ == "__main__":
    main()
