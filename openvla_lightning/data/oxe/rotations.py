"""Rotations, NumPy only."""

import numpy as np
from numpy.typing import NDArray

SMALL = np.float32(2 * np.finfo(np.float32).eps)
SHRINK = np.float32(1) - SMALL
"""The released code scales arguments of inverse functions by this factor; this changes results near the poles."""


def euler_from_quaternion(quaternion: NDArray[np.float32]) -> NDArray[np.float32]:
    """Roll, pitch and yaw [..., 3], in radians, of unit quaternions [..., 4] in the order x, y, z, w; float32.

    R = Rz(yaw) Ry(pitch) Rx(roll). If the pitch is 90 degrees, only the difference of roll and yaw is defined, and
    yaw is set to 0. A quaternion that is too long for a rotation gives NaN.
    """
    x, y, z, w = np.moveaxis(np.asarray(quaternion, np.float32), -1, 0)
    tx, ty, tz = 2 * x * SHRINK, 2 * y * SHRINK, 2 * z * SHRINK
    r00, r22 = (1 - (ty * y + tz * z)) * SHRINK, (1 - (tx * x + ty * y)) * SHRINK
    r10, r21, r20 = (ty * x + tz * w) * SHRINK, (tz * y + tx * w) * SHRINK, (tz * x - ty * w) * SHRINK
    with np.errstate(invalid="ignore"):
        pitch = -np.arcsin(r20)
    side = _sign(np.cos(pitch))
    roll = np.arctan2(r21 * side, _nonzero(r22) * side)
    yaw = np.arctan2(r10 * side, _nonzero(r00) * side)
    end = _sign(r20)
    locked = np.abs(np.abs(r20) - 1) < 1e-6
    roll = np.where(locked, np.arctan2(-end * (ty * x - tz * w), -end * _nonzero(tz * x + ty * w)), roll)
    pitch = np.where(locked, -end * np.float32(np.pi / 2), pitch)
    return np.stack([roll, pitch, np.where(locked, np.float32(0), yaw)], axis=-1)


def _sign(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(x >= 0, np.float32(1), np.float32(-1))


def _nonzero(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x + _sign(x) * SMALL
