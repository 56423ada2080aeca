"""Grasps and places of objects, from their collision shapes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.libero.geometry import Geometry, Points

WIDEST = 0.072
"""Largest width between the fingers, m."""
LOWEST = 0.018
"""Smallest height of a closing hand above the supporting surface, m; lower, the fingers push against it."""


@dataclass(frozen=True, slots=True)
class Grasp:
    """A grasp of an object.

    Attributes:
        offset: vector from the object's origin to the hand, m, in world coordinates at the time of the grasp.
        turn: rotation of the hand about the vertical, rad.
    """

    offset: Points
    turn: float


def find_grasp(scene: Geometry, thing: str) -> Grasp:
    """Grasp an object around it if it fits between the fingers; otherwise by its rim if it is hollow, or by its handle.

    Among the possible grasps, the chosen one has little rotation of the hand, little offset and few collisions.
    """
    points, origin = scene.points(thing), scene.position(thing)
    top, bottom = points[:, 2].max(), points[:, 2].min()
    height = max(min(top - 0.03, (top + bottom) / 2 + 0.03), bottom + LOWEST)
    upper = points[points[:, 2] > height - 0.015][:, :2]
    found: list[tuple[float, Points, float]] = []
    for turn in np.deg2rad(np.arange(-90, 91, 15)):
        along, across = fingers_along(turn)[:2], np.array([np.cos(turn), np.sin(turn)])
        if np.ptp(upper @ along) > WIDEST:
            continue
        middle = along * _middle(upper @ along) + across * _middle(upper @ across)
        end = max(0.0, np.ptp(upper @ across) / 2 - 0.012)
        for aside in (0.0, end, -end):
            hand = np.array([*(middle + aside * across), height])
            cost = 0.2 * abs(turn) + abs(aside) + 0.02 * _crowd(scene, thing, hand, turn)
            found.append((cost, hand, float(turn)))
    if found:
        _, hand, turn = min(found, key=lambda each: round(each[0], 6))
    else:
        hand, turn = _rim(scene, thing, points) if _hollow(points) else find_handle(points)
    return Grasp(hand - origin, turn)


def _rim(scene: Geometry, thing: str, points: Points) -> tuple[Points, float]:
    """A grasp position on the rim of a hollow object, and the hand's rotation."""
    top = points[:, 2].max()
    edge = points[points[:, 2] > top - 0.012][:, :2]
    centre = np.array([_middle(edge[:, 0]), _middle(edge[:, 1])])
    found: list[tuple[float, Points, float]] = []
    for angle in np.deg2rad(np.arange(0, 360, 15)):
        out = np.array([np.cos(angle), np.sin(angle)])
        radius = ((edge - centre) @ out).max()
        turn = float(angle % np.pi - np.pi / 2)
        hand = np.array([*(centre + (radius - 0.010) * out), max(top - 0.033, points[:, 2].min() + LOWEST)])
        cost = 0.3 * abs(turn) + 0.02 * _crowd(scene, thing, hand, turn)
        found.append((cost, hand, turn))
    _, hand, turn = min(found, key=lambda each: round(each[0], 6))
    return hand, turn


def _hollow(points: Points) -> bool:
    """Whether the middle of an object's upper half is empty, as in bowls, mugs and plates."""
    top, bottom = points[:, 2].max(), points[:, 2].min()
    upper = points[points[:, 2] > max(top - 0.035, (top + bottom) / 2)][:, :2]
    centre = np.array([_middle(upper[:, 0]), _middle(upper[:, 1])])
    return bool((np.linalg.norm(upper - centre, axis=1) > 0.4 * np.ptp(upper[:, 0]) / 2).all())


def find_handle(points: Points) -> tuple[Points, float]:
    """A grasp position on the handle of a pot or mug (its part furthest out), and the hand's rotation."""
    middle = np.median(points[:, :2], axis=0)
    away = np.linalg.norm(points[:, :2] - middle, axis=1)
    out = points[np.argmax(away), :2] - middle
    ear = points[(points[:, :2] - middle) @ out > away.max() * (away.max() - 0.035)]
    turn = float(np.arctan2(out[1], out[0]))
    hand = np.array([*((ear[:, :2].min(0) + ear[:, :2].max(0)) / 2), ear[:, 2].max() - 0.025])
    return hand, (turn + np.pi / 2) % np.pi - np.pi / 2


def _crowd(scene: Geometry, thing: str, hand: Points, turn: float) -> int:
    """Number of points of other objects that the hand would collide with."""
    others = _others(scene, thing) - hand
    along = others @ fingers_along(turn)
    across = others @ np.array([np.cos(turn), np.sin(turn), 0])
    palm = (others[:, 2] > 0.045) & (np.abs(along) < 0.11) & (np.abs(across) < 0.034)
    fingers = (others[:, 2] > -0.012) & (np.abs(along) < 0.065) & (np.abs(across) < 0.018)
    return int((palm | fingers).sum())


def _others(scene: Geometry, thing: str) -> Points:
    others = [scene.points(name) for name in scene.domain.obj_body_id if name != thing]
    return np.concatenate([np.empty((0, 3)), *others])


def tallest(scene: Geometry, thing: str) -> float:
    """Largest height of all other objects, m."""
    return float(_others(scene, thing)[:, 2].max(initial=scene.points(thing)[:, 2].min()))


def find_place(scene: Geometry, thing: str, place: str) -> tuple[Points, float]:
    """Target position of an object's origin, and the height of its lowest point at release."""
    where = scene.position(place) + _aside(scene, thing, place)
    if place in scene.domain.obj_body_id:
        points = scene.points(place)
        return where, points[:, 2].min() + 0.04
    site = scene.domain.object_sites_dict[place]
    parent = getattr(site, "parent_name", None)
    if parent and "contain" in place:
        return where, scene.points(parent)[:, 2].max() - 0.02
    return where, where[2] + scene.half_height(place) + 0.02


def _aside(scene: Geometry, thing: str, place: str) -> Points:
    """Offset with which objects that share a stove stand side by side."""
    sharing = [goal[1] for goal in scene.domain.parsed_problem["goal_state"] if goal[2:] == [place]]
    if "cook" not in place:
        return np.zeros(3)
    return np.array([0.09 * (sharing.index(thing) - (len(sharing) - 1) / 2), 0.0, 0.0])


def fingers_along(turn: float) -> Points:
    """The direction in which the fingers close [3]."""
    return np.array([-np.sin(turn), np.cos(turn), 0.0])


def _middle(values: NDArray[np.float64]) -> float:
    return float(values.min() + values.max()) / 2
