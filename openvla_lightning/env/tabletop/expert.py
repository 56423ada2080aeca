"""A scripted expert: the next action as a function of the world's present state.

It keeps no memory, so it can take over from any state, also after noise or a policy.
"""

import numpy as np

from openvla_lightning.env.tabletop.environment import Tabletop
from openvla_lightning.env.tabletop.scene import REACH, Thing

HOVER = 0.10
"""Height (m) of the fingertips during motions over the table."""

NOTCHES = 6
"""Speeds per direction: a move is a multiple of a sixth of the limit, like a joystick with notches."""

STEADY = 0.03
"""Tilt (rad) of the hand that is not corrected."""

GRASP_HEIGHT = 0.016
PUSH_HEIGHT = 0.018


def expert(env: Tabletop) -> np.ndarray:
    """Return the expert's next action [7], in the units of the environment's embodiment."""
    goal, gripper = _PLANS[env.task.family](env)
    goal = np.clip(goal, REACH[0], REACH[1])
    turn = np.array([0.0, 0.0, _grasp_yaw(env)]) - env.hand_rotation
    turn[np.abs(turn) < STEADY] = 0.0
    notch = np.array(env.embodiment.position_limit) / NOTCHES
    move = np.round((goal - env.hand_position) / notch) * notch
    return env.embodiment.from_metric(np.concatenate([move, turn, [gripper]]))


def _grasp_yaw(env: Tabletop) -> float:
    target = env.task.target
    if env.task.family in ("lift", "put") and target.shape == "cube":
        yaw = env.yaw(target)
        return (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4  # a cube is symmetric under quarter turns
    return 0.0


def _descend(env: Tabletop, xy: np.ndarray, low: float, high: float = HOVER, radius: float = 0.012) -> np.ndarray:
    """A target over `xy` on a funnel: at height `low` within the radius, rising to `high` further out."""
    away = float(np.linalg.norm(env.hand_position[:2] - xy))
    height = low + float(np.clip((away - radius) * 4.0, 0.0, max(high - low, 0.0)))
    return np.array([*xy, height])


def _touch(env: Tabletop) -> tuple[np.ndarray, float]:
    target = env.task.target
    return _descend(env, env.position(target)[:2], target.height - 0.02, radius=0.02), 0.0


def _push(env: Tabletop) -> tuple[np.ndarray, float]:
    assert env.task.direction is not None
    way = np.array(env.task.direction)
    across = np.array([-way[1], way[0]])
    here, thing = env.hand_position, env.position(env.task.target)[:2]
    gap = env.task.target.radius + 0.014  # half of the closed fingers plus a margin
    behind, beside = float((thing - here[:2]) @ way), float((here[:2] - thing) @ across)
    if behind > gap - 0.012 and abs(beside) < 0.014 and here[2] < 0.045:
        ahead = here[:2] + way * 0.06 - across * beside
        return np.array([*ahead, PUSH_HEIGHT]), 0.0
    start = thing - way * (gap + 0.022)
    return _descend(env, start, PUSH_HEIGHT, radius=0.012), 0.0


def _pick(env: Tabletop, target: Thing) -> tuple[np.ndarray, float]:
    xy = env.position(target)[:2]
    goal = _descend(env, xy, GRASP_HEIGHT)
    here = env.hand_position
    low = here[2] < GRASP_HEIGHT + 0.012
    in_place = low and np.linalg.norm(here[:2] - xy) < 0.014
    return goal, 0.0 if in_place else 1.0


def _lift(env: Tabletop) -> tuple[np.ndarray, float]:
    if env.holding(env.task.target):
        return env.hand_position + np.array([0.0, 0.0, 0.06]), 0.0
    return _pick(env, env.task.target)


def _put(env: Tabletop) -> tuple[np.ndarray, float]:
    target, plate = env.task.target, env.task.plate
    assert plate is not None
    dish, thing, here = env.position(plate), env.position(target), env.hand_position
    bottom = thing[2] - target.height / 2
    over = float(np.linalg.norm(thing[:2] - dish[:2])) < 0.028
    if over and bottom < plate.height + 0.012:
        return here + np.array([0.0, 0.0, 0.0 if env.holding(target) else 0.05]), 1.0
    if not env.holding(target):
        return _pick(env, target)
    grip = here[:2] - thing[:2]
    rest = plate.height + here[2] - bottom + 0.004
    if over:
        return np.array([*(dish[:2] + grip), rest]), 0.0
    away = float(np.linalg.norm(thing[:2] - dish[:2]))
    height = HOVER if away > 0.028 else rest
    # Rise first: a distant target would drag the object over its neighbours.
    lag = max(0.0, 0.045 - bottom)
    xy = here[:2] + (dish[:2] + grip - here[:2]) * (1.0 if lag == 0.0 else 0.0)
    return np.array([*xy, height]), 0.0


_PLANS = {"touch": _touch, "push": _push, "lift": _lift, "put": _put}
