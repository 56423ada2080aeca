"""Orientation of a simulator's pictures, found from the places that change when the arm moves."""

from collections.abc import Sequence

import numpy as np

from openvla_lightning.env.base import Check


def pixel(point: np.ndarray, position: np.ndarray, matrix: np.ndarray, fovy: float, mirrored: bool) -> np.ndarray:
    """Row and column [2], 0 to 1 over a square picture, of a point in the world.

    Args:
        point: [3], m.
        position, matrix: the camera's position [3], and its axes right, up, back as columns of [3, 3].
        fovy: vertical field of view in degrees.
        mirrored: whether the picture swaps left and right.
    """
    right, up, back = (point - position) @ np.reshape(matrix, (3, 3))
    focal = 0.5 / np.tan(np.radians(fovy) / 2)
    return 0.5 + focal / back * np.array([up, right if mirrored else -right])


def check_orientation(before: np.ndarray, after: np.ndarray, expected: Sequence[np.ndarray]) -> Check:
    """Compare the places where two pictures differ with the arm's old and new position.

    Args:
        before, after: square pictures uint8 [H, W, 3].
        expected: rows and columns, 0 to 1, of the gripper in both.
    """
    change = np.abs(after.astype(float) - before).sum(-1)
    change[change < 60] = 0
    if not change.any():
        return Check("orientation", False, "the picture does not change when the arm moves")
    indices = np.indices(change.shape)
    row, column = (np.average(index, weights=change) / len(change) for index in indices)
    places = {
        "upright": (row, column),
        "upside down": (1 - row, column),
        "mirrored": (row, 1 - column),
        "turned by 180 degrees": (1 - row, 1 - column),
    }
    distances = {name: float(np.linalg.norm(np.subtract(p, np.mean(expected, axis=0)))) for name, p in places.items()}
    closest = min(distances, key=distances.__getitem__)
    return Check(
        "orientation", closest == "upright", f"{closest}, to {100 * distances[closest]:.0f} % of the picture's side"
    )
