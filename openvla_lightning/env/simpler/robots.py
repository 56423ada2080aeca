"""The two robots of SimplerEnv: tasks, rates, and the conversion of a policy's actions."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Gripper(Protocol):
    """Converts the policy's gripper value (1 open, 0 closed) to the controller's command."""

    def __call__(self, opening: float) -> float:
        """The controller's command, -1 to 1."""


class BinaryGripper:
    """WidowX's gripper: 1 opens, -1 closes, and each action decides independently."""

    def __call__(self, opening: float) -> float:
        return 1.0 if opening > 0.5 else -1.0


class StickyGripper:
    """The Google robot's gripper: its controller takes changes (1 closes, -1 opens), which are repeated until done.

    The policy was trained on a hand that takes many steps to close, and its prediction may change meanwhile. So a
    change of more than 0.5 is held for `hold` actions, and later predictions are ignored.
    """

    def __init__(self, hold: int = 15) -> None:
        self._hold = hold
        self._before: float | None = None
        self._change, self._left = 0.0, 0

    def __call__(self, opening: float) -> float:
        change = 0.0 if self._before is None else self._before - opening
        self._before = opening
        if self._left == 0 and abs(change) > 0.5:
            self._change, self._left = change, self._hold
        if self._left:
            self._left -= 1
            return self._change
        return change


@dataclass(frozen=True, slots=True)
class Robot:
    """One robot.

    Attributes:
        tasks: names for `simpler_env.make`.
        gripper: makes a new gripper rule for each episode.
        control_hz: actions per second.
        step_limit: actions after which an episode has failed.
        episodes: number of SimplerEnv's fixed initial states; None: it draws them from the seed.
    """

    tasks: tuple[str, ...]
    gripper: type[BinaryGripper] | type[StickyGripper]
    control_hz: float
    step_limit: int
    episodes: int | None


ROBOTS = {
    "widowx": Robot(
        (
            "widowx_spoon_on_towel",
            "widowx_carrot_on_plate",
            "widowx_stack_cube",
            "widowx_put_eggplant_in_basket",
        ),
        BinaryGripper,
        control_hz=5.0,
        step_limit=120,
        episodes=24,
    ),
    "google_robot": Robot(
        (
            "google_robot_pick_coke_can",
            "google_robot_move_near",
            "google_robot_open_drawer",
            "google_robot_close_drawer",
        ),
        StickyGripper,
        control_hz=3.0,
        step_limit=160,
        episodes=None,
    ),
}


def to_controller(action: NDArray[np.float64], gripper: Gripper) -> NDArray[np.float64]:
    """An action [7] in the units of Bridge or RT-1 -> dx dy dz, a rotation vector, the gripper's command."""
    return np.concatenate([action[:3], rotation_vector(action[3:6]), [gripper(float(action[6]))]])


def rotation_vector(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Roll, pitch and yaw about fixed axes, in this order (rad) -> axis times angle [3]."""
    half = np.asarray(angles, np.float64) / 2
    (cr, cp, cy), (sr, sp, sy) = np.cos(half), np.sin(half)
    w = cr * cp * cy + sr * sp * sy
    xyz = np.array([sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy])
    length = float(np.linalg.norm(xyz))
    if length < 1e-12:
        return 2 * xyz
    angle = 2 * np.arctan2(length, w)
    angle -= 2 * np.pi * np.round(angle / (2 * np.pi))
    return xyz / length * angle
