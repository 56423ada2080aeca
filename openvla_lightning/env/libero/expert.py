"""A scripted expert for LIBERO's tasks of one thing and one place; it knows where everything is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.libero.environment import Libero

CLOSING_STEPS = 12
UP = np.array([0.0, 0.0, 1.0])
NEAR = (0.02, 0.012, 0.0, 0.03, 0.015, 0.02, 0.0)
"""How near to each of its goals the hand has to come, m."""


@dataclass(frozen=True, slots=True)
class Grasp:
    """How the things of a suite are taken and put down.

    Attributes:
        offset: where the hand takes hold, from the thing's centre, m.
        low: how far above that it closes, m.
        drop: how far above the place it opens, m.
    """

    offset: tuple[float, float, float]
    low: float
    drop: float


GRASPS = {
    "libero_spatial": Grasp((0.0, 0.05, 0.0), low=0.02, drop=0.06),  # a bowl, by its rim
    "libero_object": Grasp((0.0, 0.0, 0.0), low=0.0, drop=0.18),  # over the rim of the basket
}


class Expert:
    """Picks a thing up and puts it into its place.

    Args:
        env: after `reset`, in a task whose first goal is one thing on or in another.

    Attributes:
        stage: 0 over the thing, 1 down to it, 2 closing, 3 up, 4 over the place, 5 down to it, 6 open.
    """

    def __init__(self, env: Libero) -> None:
        self.env, self.grasp, self.stage = env, GRASPS[env.suite], 0
        _, self._thing, self._place = env.simulator.env.parsed_problem["goal_state"][0]
        self._closing, self._lifted = 0, np.zeros(3)

    def act(self) -> NDArray[np.float64]:
        """The next action [7], in the units of `Libero`."""
        hand = self.env.gripper_position
        if np.linalg.norm(self._goal(hand) - hand) < NEAR[self.stage] or self._closing > CLOSING_STEPS:
            if self.stage == 2:
                self._lifted = hand + 0.2 * UP
            self._closing, self.stage = 0, min(self.stage + 1, len(NEAR) - 1)
        self._closing += self.stage == 2
        move = np.clip((self._goal(hand) - hand) * 30, -1, 1)
        return np.array([*move, 0, 0, 0, float(not 2 <= self.stage < 6)])

    def _goal(self, hand: NDArray[np.float64]) -> NDArray[np.float64]:
        thing, place = self._position(self._thing), self._position(self._place)
        return (
            thing + 0.12 * UP,
            thing + self.grasp.low * UP,
            hand,
            self._lifted,
            np.array([*place[:2], self._lifted[2]]),
            place + self.grasp.drop * UP,
            hand,
        )[self.stage]

    def _position(self, name: str) -> NDArray[np.float64]:
        domain = self.env.simulator.env
        body = domain.obj_body_id[name.removesuffix("_contain_region")]
        return domain.sim.data.body_xpos[body] + np.array(self.grasp.offset)
