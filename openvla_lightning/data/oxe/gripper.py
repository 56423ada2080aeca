"""Conversion of gripper conventions to 1 = open, 0 = closed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def binarise(gripper: Array) -> Array:
    """Round positions [T] in 0..1 to open (1, above 0.95) or closed (0, below 0.05).

    Values in between become the next open or closed value; after the last such value, they become the raw last value,
    as released.
    """
    definite = (gripper > 0.95) | (gripper < 0.05)
    steps = len(gripper)
    following = np.minimum.accumulate(np.where(definite, np.arange(steps), steps)[::-1])[::-1]
    is_open = np.append(gripper > 0.95, False)[following]
    return np.where(following < steps, is_open, gripper[-1:]).astype(gripper.dtype)


def from_relative(gripper: Array) -> Array:
    """Turn events [T] (below -0.1 opens, above 0.1 closes) into a state [T].

    Before the first event, the state is the opposite of that event's; without any event, the gripper is open.
    """
    event = np.where(gripper < -0.1, 1, np.where(gripper > 0.1, -1, 0))
    happened = np.flatnonzero(event)
    if not len(happened):
        return np.ones_like(gripper)
    latest = np.maximum.accumulate(np.where(event != 0, np.arange(len(event)), -1))
    state = np.where(latest >= 0, event[latest], -event[happened[0]])
    return (state / 2 + 0.5).astype(gripper.dtype)


def invert(gripper: Array) -> Array:
    """Swap open and closed, without clipping."""
    return 1 - gripper


def open_is_one(
    trajectory: dict[str, Any],
    first: Callable[[dict[str, Any]], dict[str, Any]],
    places: Sequence[int],
    opened: float,
    closed: float,
) -> dict[str, Any]:
    """After `first`, bring the grippers at `places` of the action to 1 for open and 0 for closed."""
    trajectory = first(trajectory)
    action = np.array(trajectory["action"], np.float32)
    action[:, list(places)] = (action[:, list(places)] - np.float32(closed)) / np.float32(opened - closed)
    return trajectory | {"action": action}


def meaning(name: str, option: Any) -> tuple[float, float]:
    """The values for open and closed in `gripper`, a dataset's option such as `{open: 1, closed: -1}`.

    Raises:
        ValueError: it has another form.
    """
    given = list(option.values()) if isinstance(option, Mapping) and option.keys() == {"open", "closed"} else []
    if not given or not all(isinstance(one, int | float) and np.isfinite(one) for one in given) or given[0] == given[1]:
        raise ValueError(f"data.datasets.{name}.gripper={option}: two numbers that differ, {{open: 1, closed: -1}}")
    return float(option["open"]), float(option["closed"])
