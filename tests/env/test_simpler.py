"""SimplerEnv's contract: what the adapter asks of the simulator, without the simulator."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.env.simpler import ROBOTS, Simpler
from openvla_lightning.env.simpler.robots import BinaryGripper, StickyGripper, rotation_vector, to_controller


def matrix(vector: np.ndarray) -> np.ndarray:
    """Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


angle = st.floats(-3.1, 3.1)


@given(angle, angle, angle)
def test_a_rotation_vector_is_roll_then_pitch_then_yaw(roll, pitch, yaw):
    turns = [matrix(np.eye(3)[axis] * value) for axis, value in enumerate((roll, pitch, yaw))]
    vector = rotation_vector(np.array([roll, pitch, yaw]))
    assert np.linalg.norm(vector) <= np.pi + 1e-9
    assert matrix(vector) == pytest.approx(turns[2] @ turns[1] @ turns[0], abs=1e-9)


def test_the_widowx_gripper_opens_or_closes():
    gripper = BinaryGripper()
    assert [gripper(opening) for opening in (0.996, 0.6, 0.4, 0.0)] == [1, 1, -1, -1]


def test_the_google_gripper_is_sticky():
    gripper = StickyGripper()
    assert gripper(1.0) == 0  # nothing to change yet
    assert gripper(0.9) == pytest.approx(0.1)
    closing = [gripper(opening) for opening in [0.0] + [1.0] * 5 + [0.0] * 9]  # it wavers halfway
    assert closing == [pytest.approx(0.9)] * 15
    assert gripper(0.0) == 0
    assert [gripper(1.0) for _ in range(16)] == [-1.0] * 15 + [0.0]


def test_an_action_becomes_the_controllers():
    action = np.array([0.01, -0.02, 0.03, 0.0, 0.0, 0.4, 1.0])
    assert to_controller(action, BinaryGripper()).tolist() == pytest.approx([0.01, -0.02, 0.03, 0, 0, 0.4, 1.0])


class Simulator:
    """Answers as SimplerEnv does, and remembers what it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.resets, self.actions, self.closed = name, [], [], False

    def reset(self, seed, options):
        self.resets.append((seed, options))
        return {"picture": np.full((480, 640, 3), 7, np.uint8)}, {}

    def step(self, action):
        self.actions.append(action)
        return {"picture": np.full((480, 640, 3), 9, np.uint8)}, 0.0, len(self.actions) == 3, False, {}

    def get_language_instruction(self):
        return f"say {self.name}"

    def close(self):
        self.closed = True


@pytest.fixture
def made(monkeypatch) -> list[Simulator]:
    made: list[Simulator] = []
    for name in (
        "simpler_env",
        "simpler_env.utils",
        "simpler_env.utils.env",
        "simpler_env.utils.env.observation_utils",
    ):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["simpler_env"].make = lambda name: made.append(Simulator(name)) or made[-1]
    module.get_image_from_maniskill2_obs_dict = lambda env, observation: observation["picture"]
    return made


def test_an_episode_on_the_widowx(made):
    env = Simpler("widowx")
    assert {task.initial_states for task in env.tasks.values()} == {24}
    observation, info = env.reset(seed=5, options={"task": "widowx_stack_cube"})
    assert made[0].resets == [(5, {"obj_init_options": {"episode_id": 5}})]
    assert info["instruction"] == "say widowx_stack_cube"
    assert observation["image"].shape == (224, 224, 3)
    env.step(np.array([0.1, 0, 0, 0, 0, 0, 0.2]))
    env.wait()
    assert made[0].actions[1].tolist() == [0, 0, 0, 0, 0, 0, -1.0], "it keeps its grip"
    *_, terminated, truncated, info = env.step(np.zeros(7))
    assert (terminated, truncated, info["success"]) == (True, False, True)
    env.reset(seed=6, options={"task": "widowx_stack_cube"})
    assert len(made) == 1
    env.reset(seed=0, options={"task": "widowx_carrot_on_plate"})
    assert made[0].closed
    assert len(made) == 2


def test_an_episode_of_the_google_robot_starts_with_a_fresh_gripper(made):
    env = Simpler("google_robot", max_episode_steps=2)
    for _ in range(2):
        env.reset(seed=10**9, options={"task": "google_robot_pick_coke_can"})
        env.step(np.array([0, 0, 0, 0, 0, 0, 0.0]))
        assert made[0].actions[-1][6] == 0, "no change from an episode that is over"
        made[0].actions.clear()
    assert made[0].resets[0] == (10**9, {})
    env.reset(seed=1, options={"task": "google_robot_pick_coke_can"})
    made[0].actions.clear()
    assert [env.step(np.zeros(7))[3] for _ in range(2)] == [False, True]


def test_what_is_unknown_or_absent_is_named():
    with pytest.raises(ValueError, match="widowx, google_robot"):
        Simpler("franka")
    with pytest.raises(ImportError, match="simpler-env/SimplerEnv"):
        Simpler("widowx")
    assert all(robot.control_hz > 0 for robot in ROBOTS.values())
