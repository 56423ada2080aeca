"""Embodiments: the units, limits and duration of an action."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Embodiment:
    """The meaning of one robot's actions.

    Attributes:
        name: name for the constructor of `Tabletop`.
        position_unit: metres in one unit of dx, dy, dz.
        rotation_unit: radians in one unit of droll, dpitch, dyaw.
        position_limit: the largest dx, dy, dz of one action, in metres [3].
        rotation_limit: the largest droll, dpitch, dyaw of one action, in radians.
        substeps: physics steps in one action.
    """

    name: str
    position_unit: float
    rotation_unit: float
    position_limit: tuple[float, float, float]
    rotation_limit: float
    substeps: int

    @property
    def high(self) -> np.ndarray:
        """The largest action [7] in this embodiment's units; the smallest is its negative, and 0 for the gripper."""
        position = np.array(self.position_limit) / self.position_unit
        return np.array([*position, *[self.rotation_limit / self.rotation_unit] * 3, 1.0])

    @property
    def low(self) -> np.ndarray:
        """The smallest action [7]."""
        return np.concatenate([-self.high[:6], [0.0]])

    def to_metric(self, action: np.ndarray) -> np.ndarray:
        """Return an action [7], clipped to the limits, in metres and radians."""
        clipped = np.clip(action, self.low, self.high)
        return np.concatenate([clipped[:3] * self.position_unit, clipped[3:6] * self.rotation_unit, clipped[6:]])

    def from_metric(self, action: np.ndarray) -> np.ndarray:
        """Return an action [7] given in metres and radians in this embodiment's units, clipped to the limits."""
        scaled = np.concatenate([action[:3] / self.position_unit, action[3:6] / self.rotation_unit, action[6:]])
        return np.clip(scaled, self.low, self.high)


EMBODIMENTS = {
    embodiment.name: embodiment
    for embodiment in (
        Embodiment("metric", 1.0, 1.0, (0.030, 0.030, 0.030), 0.15, 20),
        Embodiment("relative", 0.05, 0.25, (0.025, 0.030, 0.030), 0.10, 16),
    )
}
"""`metric` moves in metres and radians; `relative` in units of 5 cm and a quarter radian, with other limits and a
shorter step, so a policy with the other dataset's statistics overshoots or hardly moves."""
