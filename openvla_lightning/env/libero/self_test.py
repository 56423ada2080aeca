"""Checks that LIBERO behaves here as in the policies' training data."""

from typing import TYPE_CHECKING

import numpy as np

from openvla_lightning.env.base import Check
from openvla_lightning.env.libero.engine import judge_assets
from openvla_lightning.env.libero.protocol import (
    CAMERA,
    PERTURBATIONS,
    RAMEKIN,
    RAMEKIN_BOWL,
    RAMEKIN_TASK,
    SEATED,
    STILL,
)
from openvla_lightning.env.orientation import check_orientation, pixel

if TYPE_CHECKING:
    from openvla_lightning.env.libero.environment import Libero

NUDGE, STEPS = 0.5, 10
"""A test command: half of the largest one, for half a second."""
TRAVEL = (0.03, 0.12)
"""Expected range (m) of the gripper's motion along the commanded axis."""


def self_test(env: "Libero") -> list[Check]:
    """Checks of meshes, camera, settling, picture, the effect of an action, and the picture's orientation.

    In LIBERO-Spatial, it also checks the task whose initial states break first with other physics.
    """
    checks = [_whole(env)]
    if RAMEKIN_TASK in env.tasks and env.perturbation is None:
        env.reset(seed=0, options={"task": RAMEKIN_TASK})
        checks.append(_seated(env))
    task = next(iter(env.tasks))
    observation, _ = env.reset(seed=0, options={"task": task})
    checks += [_camera(env), _settled(env), _drawn(observation["image"])]
    for axis, name in enumerate("xyz"):
        env.reset(seed=0, options={"task": task})
        checks.append(_moves(env, axis, name))
    return [*checks, _oriented(env, task)]


def _camera(env: "Libero") -> Check:
    model = env.simulator.sim.model
    index = model.camera_name2id(CAMERA)
    place, turn = env.expected_camera()
    off = max(
        np.abs(model.cam_pos[index] - place).max(),
        np.abs(model.cam_quat[index] - turn / np.linalg.norm(turn)).max(),
    )
    return Check("camera", bool(off < 1e-4), f"off where it should be by {off:.1e}")


def _whole(env: "Libero") -> Check:
    whose, seen = judge_assets(env.assets)
    return Check("meshes", whose == "LIBERO-PRO" or (whose == "LIBERO" and env.perturbation not in PERTURBATIONS), seen)


def _seated(env: "Libero") -> Check:
    bodies = env.simulator.env.obj_body_id
    bowl, ramekin = (env.simulator.sim.data.body_xpos[bodies[name]] for name in (RAMEKIN_BOWL, RAMEKIN))
    off = float(np.linalg.norm((bowl - ramekin)[:2]))
    return Check("bowl on ramekin", off < SEATED, f"{1000 * off:.1f} mm off its centre; 14.5 is right, 37 wrong")


def _settled(env: "Libero") -> Check:
    fastest = env.fastest
    return Check("settles", fastest < STILL, f"objects move at up to {fastest:.3f} m/s, {STILL} is allowed")


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
    return pixel(env.gripper_position, *view, mirrored=True)  # as in the training data
