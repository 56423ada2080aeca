"""A scripted expert for LIBERO, which knows the positions of all objects and plays a task as a list of skills."""

from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.libero.environment import Libero
from openvla_lightning.env.libero.geometry import Geometry, Points
from openvla_lightning.env.libero.grasps import Grasp, find_grasp, find_handle, find_place, fingers_along, tallest

UP = np.array([0.0, 0.0, 1.0])
DOWN = np.diag([1.0, -1.0, -1.0])
"""The hand's initial orientation: fingers down, closing along y."""

LEVEL = -np.pi / 2
"""Tilt with which the fingers point along -y."""
SHUT = 0.13
"""A drawer that is open by less is too narrow for an object, m."""

CLOSING_STEPS, OPENING_STEPS = 12, 6
ATTEMPTS = 3
"""How often each goal is tried."""

Target = Callable[[], Points] | Points
Script = Generator[NDArray[np.float64], None, Any]
"""Yields actions [7], one after the other; some scripts return whether they succeeded."""


class Expert:
    """Plays the task that `env` was reset to.

    Goals are played one after the other, so that objects are in a drawer before it is closed; a failed goal is tried
    again. Every step moves the hand or the gripper, so that a no-op filter removes none.

    Args:
        env: the environment, after `reset`.

    Attributes:
        travelling: whether the hand is between two skills, where a push does no harm.
    """

    def __init__(self, env: Libero) -> None:
        self.env, self.travelling = env, False
        self.scene = Geometry(env.simulator)
        self._closed = False
        self._script = self._play()

    def act(self) -> NDArray[np.float64]:
        """The next action [7], in the units of `Libero`."""
        return next(self._script)

    def _play(self) -> Script:
        goals = self.scene.domain.parsed_problem["goal_state"]
        order = {"open": 0, "turnon": 1, "on": 2, "in": 2, "turnoff": 3, "close": 4}
        for goal in sorted(goals, key=lambda goal: order.get(goal[0], 2)):
            for _ in range(ATTEMPTS):
                if self._reached(goal):
                    break
                yield from self._SKILLS[goal[0]](self, *goal[1:])
                yield from self._rise()
        while True:
            yield from self._hold(1, UP * 0.1)

    def _reached(self, goal: list[str]) -> bool:
        return bool(self.scene.domain._eval_predicate(goal))

    # Skills.

    def _put(self, thing: str, place: str) -> Script:
        grasp = find_grasp(self.scene, thing)
        taken = yield from self._take(thing, grasp)
        if taken:
            yield from self._release_over(thing, place, grasp.turn)

    def _take(self, thing: str, grasp: Grasp) -> Script:
        """Move over the object, down, close, up; return whether the object moved with the hand."""
        if self._closed:
            yield from self._open()
        place = self.scene.position(thing)

        def over() -> Points:
            return self.scene.position(thing) + grasp.offset

        top = self.scene.points(thing)[:, 2].max()
        yield from self._travel(lambda: np.array([*over()[:2], max(top, over()[2]) + 0.08]), grasp.turn)
        yield from self._go(lambda: over() + 0.05 * UP, grasp.turn, near=0.012)
        yield from self._go(over, grasp.turn, near=0.006)
        yield from self._close()
        yield from self._go(self._hand() + 0.10 * UP, grasp.turn, near=0.03)
        return self.scene.position(thing)[2] > place[2] + 0.03

    def _release_over(self, thing: str, place: str, turn: float) -> Script:
        held = self.scene.position(thing) - self._hand()
        low = self.scene.points(thing)[:, 2].min() - self._hand()[2]
        goal, height = find_place(self.scene, thing, place)
        clear = max(tallest(self.scene, thing) + 0.03 - low, self._hand()[2])
        hand = np.array([*(goal - held)[:2], clear])
        yield from self._travel(np.array([*self._hand()[:2], clear]), turn, near=0.03)
        yield from self._travel(hand, turn, near=0.01)
        yield from self._go(np.array([*hand[:2], height - low]), turn, near=0.01)
        yield from self._open()

    def _insert(self, thing: str, place: str) -> Script:
        """Put an object into a place; open a closed drawer first."""
        joint = self.scene.joint(place) if place not in self.scene.domain.obj_body_id else None
        if joint is not None and self._slides(joint) and self.scene.angle(joint) > -SHUT:
            yield from self._pull(place)
        if place.startswith("microwave"):
            yield from self._serve(thing, place)
        else:
            yield from self._put(thing, place)

    def _pull(self, region: str) -> Script:
        """Open a drawer by its handle, with level fingers around it."""
        joint = self.scene.joint(region)
        assert joint is not None
        out, handle = self._handle(joint)
        turn = _bearing(out)
        yield from self._travel(handle + 0.13 * out + 0.10 * UP, turn, tilt=LEVEL)
        yield from self._go(handle + 0.10 * out, turn, tilt=LEVEL)
        yield from self._go(handle - 0.004 * out, turn, tilt=LEVEL, near=0.008)
        yield from self._close()
        yield from self._go(self._hand() + 0.19 * out, turn, tilt=LEVEL)
        yield from self._open()
        yield from self._go(self._hand() + 0.06 * out, turn, tilt=LEVEL)
        yield from self._travel(self._hand() + 0.15 * UP, turn, near=0.03)

    def _shut(self, name: str) -> Script:
        """Push a drawer's handle in with the fingertips, or push a door closed."""
        joint = self.scene.joint(name)
        assert joint is not None
        if not self._slides(joint):
            yield from self._swing(joint)
            return
        out, handle = self._handle(joint)
        turn, hand = _bearing(out), {"tilt": 0.7 * LEVEL, "roll": np.pi / 2}
        yield from self._close()
        yield from self._travel(handle + 0.10 * out + 0.15 * UP, turn, **hand)
        yield from self._go(handle + 0.05 * out, turn, **hand)
        yield from self._go(handle - 0.22 * out, turn, **hand)
        yield from self._go(self._hand() + 0.06 * out, turn, **hand)
        yield from self._open()

    def _swing(self, joint: int) -> Script:
        """Close a door with a vertical hinge, open by a negative angle, by pushing near its far edge."""
        hinge, points = self.scene.data.xanchor[joint].copy(), self.scene.moved_by(joint)
        far = points[np.argmax(np.linalg.norm((points - hinge)[:, :2], axis=1))] - hinge
        first, angle = float(np.arctan2(far[1], far[0])), self.scene.angle(joint)
        radius, top = 0.8 * float(np.linalg.norm(far[:2])), points[:, 2].max() - 0.035

        def beside(turned: float, gap: float) -> Points:
            way = first + turned
            door, outside = np.array([np.cos(way), np.sin(way)]), np.array([np.sin(way), -np.cos(way)])
            return np.array([*(hinge[:2] + radius * door + gap * outside), top])

        yield from self._close()
        yield from self._travel(beside(0.0, 0.12) + 0.15 * UP, 0.0)
        yield from self._go(beside(0.0, 0.10), near=0.02)
        for turned in np.append(np.arange(0.0, -angle, 0.15), -angle + 0.15):
            yield from self._go(beside(turned, 0.02), near=0.03)
        yield from self._go(self._hand() - 0.05 * np.array([0, 1, 0]), near=0.02)
        yield from self._open()

    def _serve(self, thing: str, place: str) -> Script:
        """Put an object into a microwave: hold its handle between level fingers and move straight in."""
        points, origin = self.scene.points(thing), self.scene.position(thing)
        ear, _ = find_handle(points)
        inward = np.array([0.0, 1.0, 0.0])
        pose = {"tilt": LEVEL, "roll": np.pi / 2}
        hand = np.array([*ear[:2], (points[:, 2].min() + points[:, 2].max()) / 2 + 0.01])
        yield from self._travel(hand - 0.12 * inward + 0.12 * UP, np.pi, **pose)
        yield from self._go(hand - 0.10 * inward, np.pi, **pose)
        yield from self._go(hand + 0.005 * inward, np.pi, near=0.008, **pose)
        yield from self._close()
        yield from self._go(self._hand() + 0.065 * UP, np.pi, **pose)
        inside = self.scene.position(place) - origin
        hand = self._hand()
        yield from self._go(hand + np.array([inside[0] - 0.02, 0.05, 0.0]), np.pi, **pose)
        yield from self._go(hand + np.array([inside[0] - 0.02, inside[1] - 0.03, 0.0]), np.pi, **pose)
        yield from self._go(self._hand() - 0.02 * UP, np.pi, **pose)
        yield from self._open()
        yield from self._go(self._hand() - 0.30 * inward, np.pi, near=0.03, **pose)

    def _slides(self, joint: int) -> bool:
        return self.scene.model.jnt_type[joint] == 2

    def _handle(self, joint: int) -> tuple[Points, Points]:
        """The direction in which a drawer opens, and the centre of its handle."""
        out = -self.scene.data.xaxis[joint]
        points = self.scene.moved_by(joint)
        far = points @ out
        return out, points[far > far.max() - 0.016].mean(0)

    def _switch_on(self, stove: str) -> Script:
        """Grasp the knob and turn it."""
        joint = self.scene.joint(stove)
        assert joint is not None
        points = self.scene.moved_by(joint)
        blade = points[points[:, 2] > points[:, 2].max() - 0.01]
        first = min(
            np.deg2rad(np.arange(-90, 91, 5)), key=lambda turn: np.ptp(blade @ fingers_along(turn)) + 0.001 * abs(turn)
        )
        knob = np.array([*self.scene.data.xanchor[joint][:2], points[:, 2].max() - 0.02])
        yield from self._travel(knob + 0.12 * UP, first)
        yield from self._go(knob, first, near=0.006)
        yield from self._close()
        for turn in np.arange(first, first + 1.3, 0.25):
            yield from self._go(knob, turn, near=0.03)
        yield from self._open()

    # Motions.

    def _hand(self) -> Points:
        return self.env.gripper_position

    def _travel(self, target: Target, turn: float, near: float = 0.02, tilt: float = 0.0, roll: float = 0.0) -> Script:
        self.travelling = True
        yield from self._go(target, turn, near, tilt, roll)
        self.travelling = False

    def _go(
        self, target: Target, turn: float = 0.0, near: float = 0.01, tilt: float = 0.0, roll: float = 0.0
    ) -> Script:
        """Move until the hand is near the target, or has not moved for a while.

        The fingers point down, rotated by `roll` about their own axis, lifted by `tilt` and rotated by `turn` about the
        vertical, rad.
        """
        orientation = _about_z(turn) @ _about_x(tilt) @ _about_z(roll) @ DOWN
        trace: list[Points] = []
        while True:
            hand = self._hand()
            goal = target() if callable(target) else target
            twist = _rotation_vector(orientation @ self._orientation().T)
            if np.linalg.norm(goal - hand) < near and np.linalg.norm(twist) < 0.12:
                return
            trace.append(np.array([*hand, *twist]))
            if len(trace) > 10 and np.abs(trace[-1] - trace[-11]).max() < 0.003:
                return
            yield self._action((goal - hand) * 25, twist * 1.5)

    def _rise(self) -> Script:
        yield from self._travel(self._hand() + 0.08 * UP, 0.0, near=0.03)

    def _close(self) -> Script:
        self._closed = True
        yield from self._hold(CLOSING_STEPS, 0.02 * UP)

    def _open(self) -> Script:
        self._closed = False
        yield from self._hold(OPENING_STEPS, 0.02 * UP)

    def _hold(self, steps: int, move: Points) -> Script:
        for _ in range(steps):
            yield self._action(move, np.zeros(3))

    def _action(self, move: Points, twist: Points) -> NDArray[np.float64]:
        return np.array([*np.clip(move, -1, 1), *np.clip(twist, -0.5, 0.5), float(not self._closed)])

    def _orientation(self) -> NDArray[np.float64]:
        name = self.env.simulator.robots[0].robot_model.eef_name
        return self.scene.domain.sim.data.get_body_xmat(name).reshape(3, 3)

    _SKILLS: ClassVar[Mapping[str, Callable[..., Script]]] = {
        "on": _put,
        "in": _insert,
        "open": _pull,
        "close": _shut,
        "turnon": _switch_on,
    }


def _bearing(out: Points) -> float:
    """Angle of a direction from y about the vertical, rad."""
    return float(np.arctan2(-out[0], out[1]))


def _about_z(angle: float) -> NDArray[np.float64]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _about_x(angle: float) -> NDArray[np.float64]:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def _rotation_vector(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axis times angle [3] of a rotation matrix [3, 3]."""
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]]) / 2
    sine, cosine = float(np.linalg.norm(axis)), (np.trace(matrix) - 1) / 2
    return axis / max(sine, 1e-9) * np.arctan2(sine, cosine)
