"""Whether LIBERO behaves here as it did where policies were trained."""

from typing import TYPE_CHECKING

import numpy as np

from openvla_lightning.env.base import Check
from openvla_lightning.env.libero.protocol import CAMERA, CAMERAS
from openvla_lightning.env.orientation import check_orientation, pixel

if TYPE_CHECKING:
    from openvla_lightning.env.libero.environment import Libero

NUDGE, STEPS = 0.5, 10
"""Half of the largest command, for half a second."""
TRAVEL = (0.03, 0.12)
"""How far (m) that moves the gripper along the axis it was told."""


def self_test(env: "Libero") -> list[Check]:
    """Camera, settling, picture, what an action does, and which way up the picture is."""
    task = next(iter(env.tasks))
    observation, _ = env.reset(seed=0, options={"task": task})
    checks = [_camera(env), _settled(env), _drawn(observation["image"])]
    for axis, name in enumerate("xyz"):
        env.reset(seed=0, options={"task": task})
        checks.append(_moves(env, axis, name))
    return [*checks, _oriented(env, task)]


def _camera(env: "Libero") -> Check:
    model = env.simulator.sim.model
    index = model.camera_name2id(CAMERA)
    expected = CAMERAS[env.simulator.problem_name]
    off = max(
        np.abs(model.cam_pos[index] - expected[0]).max(),
        np.abs(model.cam_quat[index] - np.array(expected[1]) / np.linalg.norm(expected[1])).max(),
    )
    return Check("camera", bool(off < 1e-4), f"off the training data's by {off:.1e}")


def _settled(env: "Libero") -> Check:
    model, data = env.simulator.sim.model, env.simulator.sim.data
    moving = [abs(data.qvel[model.jnt_dofadr[j] : model.jnt_dofadr[j] + 3]).max() for j in range(model.njnt)
              if model.jnt_type[j] == 0]  # fmt: skip
    fastest = max(moving, default=0.0)
    return Check("settles", bool(fastest < 0.1), f"objects move at up to {fastest:.3f} m/s")


def _drawn(image: np.ndarray) -> Check:
    contrast = float(image.std())
    return Check("renders", contrast > 10, f"contrast {contrast:.0f} of 255")


def _moves(env: "Libero", axis: int, name: str) -> Check:
    before = env.gripper_position
    command = np.array([*np.zeros(6), 1.0])
    command[axis] = NUDGE
    for _ in range(STEPS):
        env.step(command)
    moved = env.gripper_position - before
    aside = np.abs(np.delete(moved, axis)).max()
    ok = TRAVEL[0] < moved[axis] < TRAVEL[1] and aside < moved[axis] / 2
    return Check(f"action {name}", bool(ok), f"{STEPS} x {NUDGE} moved it {100 * moved[axis]:.1f} cm")


def _oriented(env: "Libero", task: str) -> Check:
    before, _ = env.reset(seed=0, options={"task": task})
    expected = [_gripper_pixel(env)]
    for _ in range(2 * STEPS):
        after, *_ = env.step(np.array([0, 1.0, 0, 0, 0, 0, 1]))
    return check_orientation(before["image"], after["image"], [*expected, _gripper_pixel(env)])


def _gripper_pixel(env: "Libero") -> np.ndarray:
    model, data = env.simulator.sim.model, env.simulator.sim.data
    index = model.camera_name2id(CAMERA)
    view = data.cam_xpos[index], data.cam_xmat[index], model.cam_fovy[index]
    return pixel(env.gripper_position, *view, mirrored=True)  # as the training data is
