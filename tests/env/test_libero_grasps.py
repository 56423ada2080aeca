"""Where LIBERO's scripted expert holds things: shapes made up here, no simulator."""

import numpy as np
import pytest

from openvla_lightning.env.libero.grasps import LOWEST, WIDEST, _hollow, find_grasp, find_handle, fingers_along


class Scene:
    """Things by name, as points [N, 3]."""

    def __init__(self, **things: np.ndarray) -> None:
        self.things, self.domain = things, self
        self.obj_body_id = things

    def points(self, name: str) -> np.ndarray:
        return self.things[name]

    def position(self, name: str) -> np.ndarray:
        return self.things[name].mean(0)


def box(x: float, y: float, z: float, middle: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """A box on the table, of these sizes, m."""
    axes = [np.linspace(-side / 2, side / 2, max(2, int(side / 0.01))) for side in (x, y, z)]
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, 3)
    return grid + np.array([*middle, z / 2])


def ring(radius: float, height: float) -> np.ndarray:
    around = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.array([[radius * np.cos(a), radius * np.sin(a), z] for a in around for z in (0.0, height / 2, height)])


def hand_on(scene: Scene, thing: str) -> tuple[np.ndarray, float]:
    grasp = find_grasp(scene, thing)
    return scene.position(thing) + grasp.offset, grasp.turn


@pytest.mark.parametrize(("size", "turn"), [((0.10, 0.04, 0.02), 0.0), ((0.04, 0.10, 0.02), np.pi / 2)])
def test_a_box_is_held_across_its_narrow_side(size, turn):
    hand, found = hand_on(Scene(box=box(*size)), "box")
    assert abs(found) == pytest.approx(turn, abs=0.27)
    assert np.linalg.norm(hand[:2]) < 1e-9
    assert hand[2] == pytest.approx(LOWEST), "not so low that the fingers meet the table"


def test_a_tall_thing_is_held_below_its_top():
    """At its centre the palm would meet its top before the fingers get there."""
    hand, _ = hand_on(Scene(bottle=box(0.05, 0.05, 0.15)), "bottle")
    assert 0.10 < hand[2] < 0.125


def test_a_box_beside_something_tall_is_held_at_the_other_end():
    alone, _ = hand_on(Scene(box=box(0.08, 0.04, 0.02)), "box")
    scene = Scene(box=box(0.08, 0.04, 0.02), milk=box(0.05, 0.05, 0.13, (-0.05, 0.06)))
    hand, turn = hand_on(scene, "box")
    assert (abs(hand[0]) > abs(alone[0]) + 0.02) or abs(turn) > 0.2
    assert hand[0] >= 0


def test_a_bowl_is_held_by_its_edge_with_a_finger_inside():
    bowl = ring(0.055, 0.05)
    assert _hollow(bowl)
    hand, turn = hand_on(Scene(bowl=bowl), "bowl")
    assert 0.035 < np.linalg.norm(hand[:2]) < 0.055
    across = hand[:2] / np.linalg.norm(hand[:2])
    assert abs(across @ fingers_along(turn)[:2]) == pytest.approx(1.0), "the fingers close along the radius"


@pytest.mark.parametrize("angle", np.deg2rad([0, 60, 90, 200, 270]))
def test_a_pot_is_held_by_its_handle(angle):
    body = box(0.085, 0.085, 0.13)
    assert np.ptp(body[:, 0]) > WIDEST
    assert not _hollow(body)
    out = np.array([np.cos(angle), np.sin(angle), 0])
    handle = np.array([[0, 0, z] for z in np.linspace(0.05, 0.12, 8)]) + 0.10 * out
    hand, turn = find_handle(np.concatenate([body, handle, handle - 0.01 * out]))
    assert np.linalg.norm(hand[:2] - 0.095 * out[:2]) < 0.01
    assert abs(fingers_along(turn)[:2] @ out[:2]) < 0.05, "the fingers close around it"
    assert -np.pi / 2 <= turn <= np.pi / 2
