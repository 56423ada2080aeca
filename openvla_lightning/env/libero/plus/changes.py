"""The changes of LIBERO-Plus that are numbers: where the camera stands, and how the robot starts."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from openvla_lightning.env.libero.protocol import CAMERAS

_POSE = (0.0, -1.61037389e-01, 0.0, -2.44459747, 0.0, 2.2267522, np.pi / 4)
"""Joint angles (rad) at the start of LIBERO's episodes."""
_STARTS, _SAME_SIZE = 500, 100
_PIVOT = np.array([0.0, 0.0, 0.8])
"""The point (m) about which the camera moves."""


def camera_pose(problem: str, view: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Position [3] (m) and orientation [4] (w, x, y, z) of the agent view; rounded after each turn, as there."""
    horizontal, vertical, distance, own_turn, own_tilt = view
    place, (w, *xyz) = np.array(CAMERAS[problem][0]), CAMERAS[problem][1]
    turn = Rotation.from_quat([*xyz, w])
    if vertical:
        tilt = Rotation.from_rotvec([0, np.radians(-vertical), 0])
        place, turn = np.round(tilt.apply(place - _PIVOT) + _PIVOT, 4), _rounded(tilt * turn)
    around = Rotation.from_euler("z", horizontal, degrees=True)
    place, turn = np.round(around.apply(place), 4), _rounded(around * turn)
    if distance != 100:
        place = np.round(_PIVOT + (place - _PIVOT) * (distance / 100), 4)
    if own_turn:
        turn = _rounded(Rotation.from_euler("z", own_turn, degrees=True) * turn)
    if own_tilt:
        turn = _rounded(Rotation.from_rotvec([0, np.radians(-own_tilt), 0]) * turn)
    x, y, z, w = turn.as_quat()
    return place, np.array([w, x, y, z])


def _rounded(turn: Rotation) -> Rotation:
    return Rotation.from_quat(np.round(turn.as_quat(), 4))


@cache
def start_poses() -> NDArray[np.float64]:
    """LIBERO-Plus's 500 start poses of the arm [500, 7] (rad): 100 each, 0.1, 0.2, ... 0.5 away from LIBERO's.

    They are the ones that its robots' classes hold, drawn as the script that made these classes drew them.
    """
    away = np.random.RandomState(42).randn(_STARTS, len(_POSE))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    sizes = 0.1 * (1 + np.arange(_STARTS) // _SAME_SIZE)
    return np.round(_POSE + away * sizes[:, None], 8)
