"""A robot of the lab's own, whose recordings need code."""

from typing import Any

import numpy as np


def standardise(trajectory: dict[str, Any]) -> dict[str, Any]:
    """Millimetres become metres, and a gripper of 0 to 100 % becomes 0 to 1."""
    action = np.asarray(trajectory["action"], np.float32).copy()
    action[:, :3] /= 1000
    action[:, -1] = action[:, -1] > 50
    return {**trajectory, "action": action}
