"""LIBERO: the protocol without the simulator, and the simulator where the extra and its meshes are installed."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from openvla_lightning.data.oxe.registry import dataset_spec
from openvla_lightning.env.libero import STEP_LIMITS, Libero
from openvla_lightning.env.libero.expert import GRASPS, Expert
from openvla_lightning.env.libero.protocol import NO_OP, SETTLING_STEPS, picture, to_dataset, to_simulator
from openvla_lightning.libero_demonstrations import Demonstration

ASSETS = os.environ.get("LIBERO_ASSETS")


def test_the_protocol_is_the_papers():
    assert STEP_LIMITS == {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    }
    assert SETTLING_STEPS == 10
    assert NO_OP == (0, 0, 0, 0, 0, 0, -1)


def test_the_gripper_is_mapped_binarised_and_flipped():
    for said, done in ((1.0, -1), (0.996, -1), (0.6, -1), (0.4, 1), (0.004, 1), (0.0, 1)):
        action = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6, said])
        robot = to_simulator(action)
        assert robot[6] == done
        assert (robot[:6] == action[:6]).all()
    recorded = np.array([0.1] * 6 + [-1.0])
    for gripper in (-1.0, 1.0):
        recorded[6] = gripper
        assert (to_simulator(to_dataset(recorded)) == recorded).all()


def test_pictures_are_turned_by_180_degrees_and_resized():
    rendered = np.zeros((256, 256, 3), np.uint8)
    rendered[:64, :128] = (250, 20, 20)  # the bottom right of the picture that the policy sees
    seen = picture(rendered, 224).astype(int)
    assert seen.shape == (224, 224, 3)
    assert (abs(seen[180:, 120:] - (250, 20, 20)) < 12).all()
    assert (seen[:160] < 12).all()
    assert (seen[180:, :100] < 12).all()


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match="libero_spatial, libero_object"):
        Libero("libero_long")


@pytest.mark.skipif(find_spec("libero") is not None, reason="the extra is installed")
def test_without_the_extra_the_error_says_how_to_install_it():
    with pytest.raises(ImportError, match=r"pip install 'openvla-lightning\[libero\]'"):
        Libero("libero_spatial")


simulator = pytest.mark.skipif(
    find_spec("libero") is None or not ASSETS,
    reason="needs the extra `libero` and LIBERO_ASSETS, the folder of its meshes",
)


@pytest.fixture(scope="module")
def spatial() -> Iterator[Libero]:
    env = Libero("libero_spatial", assets=ASSETS)
    yield env
    env.close()


@simulator
def test_the_world_passes_its_own_test(spatial):
    checks = spatial.self_test()
    assert {check.name for check in checks} >= {"camera", "settles", "renders", "action x", "orientation"}
    assert not [check for check in checks if not check.ok]


@simulator
def test_tasks_and_initial_states_are_the_benchmarks(spatial):
    assert len(spatial.tasks) == 10
    task = next(iter(spatial.tasks.values()))
    assert task.instruction == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert {task.initial_states for task in spatial.tasks.values()} == {50}
    assert (spatial.max_episode_steps, spatial.control_hz) == (220, 20)
    with pytest.raises(ValueError, match="initial states 0 to 49, not 50"):
        spatial.reset(seed=50, options={"task": task.name})


@simulator
def test_an_episode_depends_on_its_initial_state_alone(spatial):
    first, second = list(spatial.tasks)[:2]
    pictures = []
    for task, number in ((first, 3), (second, 3), (first, 3), (first, 4)):
        observation, info = spatial.reset(seed=number, options={"task": task})
        moved, *_ = spatial.step(np.array([0.5, 0, 0, 0, 0, 0, 1.0]))
        pictures.append((observation["image"], moved["image"]))
        assert observation["image"].shape == (224, 224, 3)
        assert not info["success"]
    assert all((a == b).all() for a, b in zip(pictures[0], pictures[2], strict=True))
    assert (pictures[0][0] != pictures[1][0]).any()
    assert (pictures[0][0] != pictures[3][0]).any()


@simulator
@pytest.mark.parametrize("suite", sorted(GRASPS))
def test_a_scripted_demonstration_succeeds(suite):
    """Through our actions: so they mean what they should."""
    env = Libero(suite, assets=ASSETS)
    env.reset(seed=0, options={"task": next(iter(env.tasks))})
    expert, ended = Expert(env), False
    while not ended:
        _, _, success, truncated, _ = env.step(expert.act())
        ended = success or truncated
    env.close()
    assert success


@simulator
def test_a_demonstration_is_in_the_layout_of_the_released_data():
    steps = Demonstration("libero_object", 0, pushes=0.5)("val", 0)["steps"]
    assert set(steps[0]) == {"observation", "action", "language_instruction"}
    trajectory = {
        "observation": {key: np.stack([step["observation"][key] for step in steps]) for key in steps[0]["observation"]},
        "action": np.stack([step["action"] for step in steps]),
    }
    assert {key: value.shape[1:] for key, value in trajectory["observation"].items()} == {
        "image": (256, 256, 3),
        "wrist_image": (256, 256, 3),
        "state": (8,),
    }
    assert set(trajectory["action"][:, 6]) == {-1.0, 1.0}
    standard = dataset_spec("libero_object_no_noops").transform(trajectory)["action"]
    assert standard[0, 6] == 1, "open"
    np.testing.assert_array_equal(standard[:, 6], [to_dataset(action)[6] for action in trajectory["action"]])


@simulator
def test_missing_meshes_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"env\.assets=/path/to/assets"):
        Libero("libero_goal", assets=tmp_path)
