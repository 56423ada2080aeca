"""Checks that the tabletop world renders and moves correctly on this machine."""

from typing import TYPE_CHECKING

import numpy as np

from openvla_lightning.env.base import EVALUATION_SEEDS, Check
from openvla_lightning.env.orientation import check_orientation

if TYPE_CHECKING:
    from openvla_lightning.env.tabletop.environment import Tabletop

STEPS, PATIENCE = 4, 80


def self_test(env: "Tabletop") -> list[Check]:
    """Checks of the picture, the effect of an action, and the picture's orientation."""
    options, seed = {"task": next(iter(env.tasks))}, EVALUATION_SEEDS[0]
    first, _ = env.reset(seed=seed, options=options)
    again, _ = env.reset(seed=seed, options=options)
    contrast = float(first["image"].std())
    same = bool((first["image"] == again["image"]).all())
    checks = [
        Check("renders", contrast > 10, f"contrast {contrast:.0f} of 255"),
        Check("repeats", same, "the same seed gave " + ("the same picture" if same else "another picture")),
    ]
    return [*checks, _moves(env, 0, "x"), _moves(env, 1, "y"), _oriented(env), _scripted(env)]


def _moves(env: "Tabletop", axis: int, name: str) -> Check:
    """Command the hand towards the middle of the table, and check how far it moves."""
    env.reset(seed=EVALUATION_SEEDS[0], options={"task": next(iter(env.tasks))})
    hand = env.hand_position
    sign = -1.0 if hand[axis] > 0 else 1.0
    _command(env, np.eye(3)[axis] * sign, STEPS)
    moved = float((env.hand_position - hand)[axis]) * sign
    full = STEPS * env.embodiment.position_limit[axis]
    return Check(f"action {name}", 0.5 * full < moved < 1.2 * full, f"{100 * moved:.1f} cm of {100 * full:.0f}")


def _oriented(env: "Tabletop") -> Check:
    """Check that the arm in the far right corner of the table appears at the top right."""
    env.reset(seed=EVALUATION_SEEDS[0], options={"task": next(iter(env.tasks))})
    before = _command(env, np.array([-1.0, 1.0, 0.0]), 4 * STEPS)
    expected = [env.hand_pixel()]
    after = _command(env, np.array([0.0, -1.0, 0.0]), STEPS)
    return check_orientation(before, after, [*expected, env.hand_pixel()])


def _command(env: "Tabletop", direction: np.ndarray, steps: int) -> np.ndarray:
    """Send the largest action in `direction` [3], `steps` times, and return the last picture."""
    for _ in range(steps):
        observation, *_ = env.step(np.array([*(direction * env.embodiment.high[:3]), 0, 0, 0, 1.0]))
    return observation["image"]


def _scripted(env: "Tabletop") -> Check:
    """Check that the scripted expert succeeds, independent of the environment's step limit."""
    from openvla_lightning.env.tabletop.expert import expert

    env.reset(seed=EVALUATION_SEEDS[0], options={"task": next(iter(env.tasks))})
    steps, terminated = 0, False
    while not terminated and steps < PATIENCE:
        *_, terminated, _, info = env.step(expert(env))
        steps += 1
    outcome = "succeeded" if info["success"] else "did not succeed"
    return Check("scripted episode", info["success"], f"the expert {outcome} in {steps} actions")
