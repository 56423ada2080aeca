"""Whether the tabletop world draws and moves on this machine as it should."""

from typing import TYPE_CHECKING

import numpy as np

from openvla_lightning.env.base import EVALUATION_SEEDS, Check
from openvla_lightning.env.orientation import check_orientation

if TYPE_CHECKING:
    from openvla_lightning.env.tabletop.environment import Tabletop

STEPS = 4


def self_test(env: "Tabletop") -> list[Check]:
    """The picture, what an action does, and which way up the picture is."""
    options, seed = {"task": next(iter(env.tasks))}, EVALUATION_SEEDS[0]
    first, _ = env.reset(seed=seed, options=options)
    again, _ = env.reset(seed=seed, options=options)
    contrast = float(first["image"].std())
    same = bool((first["image"] == again["image"]).all())
    checks = [
        Check("renders", contrast > 10, f"contrast {contrast:.0f} of 255"),
        Check("repeats", same, "the same seed gave " + ("the same picture" if same else "another picture")),
    ]
    return [*checks, *_moves(env, 0, "x"), *_moves(env, 1, "y")]


def _moves(env: "Tabletop", axis: int, name: str) -> list[Check]:
    """Command the hand towards the middle of the table, and see where it and its pictures go."""
    before, _ = env.reset(seed=EVALUATION_SEEDS[0], options={"task": next(iter(env.tasks))})
    hand, expected = env.hand_position, [env.hand_pixel()]
    sign = -1.0 if hand[axis] > 0 else 1.0
    command = np.array([*np.zeros(6), 1.0])
    command[axis] = sign * env.embodiment.high[axis]
    for _ in range(STEPS):
        after, *_ = env.step(command)
    moved = float((env.hand_position - hand)[axis]) * sign
    full = STEPS * env.embodiment.position_limit[axis]
    checks = [Check(f"action {name}", 0.5 * full < moved < 1.2 * full, f"{100 * moved:.1f} cm of {100 * full:.0f}")]
    if axis == 1:
        checks.append(check_orientation(before["image"], after["image"], [*expected, env.hand_pixel()]))
    return checks
