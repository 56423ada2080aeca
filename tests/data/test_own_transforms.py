"""What users write about their dataset, their own function included: what is wrong with it is theirs, and no damage."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_lerobot
import toy_rlds

from openvla_lightning.data.oxe import describe
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds import RLDS


def nothing(trajectory: dict) -> None:
    trajectory["action"] *= 2  # and its author forgot to return it


def misnamed(trajectory: dict) -> dict:
    return trajectory | {"action": trajectory["acton"]}


def divides(trajectory: dict) -> dict:
    raise ZeroDivisionError("the gripper has no width")


def says(trajectory: dict) -> dict:
    return trajectory | {"language_instruction": "pose le gâteau"}


def shorter(trajectory: dict) -> dict:
    return trajectory | {"action": trajectory["action"][1:], "language_instruction": "stack the cubes"}


WRONG = [
    ("nothing", "returned NoneType, not the trajectory: a dictionary"),
    ("misnamed", "raised KeyError: 'acton'"),
    ("divides", "raised ZeroDivisionError: the gripper has no width"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    toy_rlds.write(folder / "rlds" / "1.0.0")
    toy_lerobot.write(folder / "lerobot")
    return folder


def opened(root: Path, form: str, transform: str, **options: Any) -> Any:
    function = f"{__name__}.{transform}"
    if form == "lerobot":
        return toy_lerobot.opened(root, "lerobot", transform=function, **options)
    return RLDS(root, "rlds", describe("rlds", {**toy_rlds.SPEC, "transform": function}), **options)


@pytest.mark.parametrize("form", ["rlds", "lerobot"])
@pytest.mark.parametrize(("transform", "reason"), WRONG)
def test_a_transform_is_blamed_for_what_it_does(root: Path, form: str, transform: str, reason: str) -> None:
    match = rf"(trajectory|episode) 0: its transform {transform} {reason}\. Mend that function, or leave such"
    with pytest.raises(BadShardError, match=match):
        opened(root, form, transform).prepare()
    with pytest.raises(BadShardError, match=f"its transform {transform} {reason}"):  # of every one
        opened(root, form, transform, bad_trajectories="skip").prepare()


@pytest.mark.parametrize("form", ["rlds", "lerobot"])
def test_a_transform_may_say_any_words(root: Path, form: str) -> None:
    assert set(opened(root, form, "says").index.instructions) == {"pose le gâteau"}


@pytest.mark.parametrize("form", ["rlds", "lerobot"])
def test_pictures_stay_beside_their_actions(root: Path, form: str) -> None:
    with pytest.raises(BadShardError, match=r"there are 4 actions and 5 (images|pictures|entries) of"):
        opened(root, form, "shorter").prepare()


def test_one_long_text_among_many_steps_takes_the_memory_of_one(tmp_path: Path) -> None:
    long = "öffne die Lade und " * 200
    toy_lerobot.write_lerobot(
        tmp_path / "toy",
        {"action": toy_lerobot.FEATURES["action"]},
        (20_000,),
        (long,),
        lambda number: toy_lerobot.Recording({"action": np.zeros((20_000, 7), np.float32)}, {}, [long] * 20_000),
        fps=10,
        workers=0,
        progress=False,
    )
    source = toy_lerobot.opened(tmp_path, cameras={"primary": None}, state=[], workers=0)
    tracemalloc.start()
    source.prepare()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.index.instructions == (long,)
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"  # 20,000 times 4,000 bytes are 80 MB


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("control_hz", "ten", "a number above 0"),
        ("control_hz", 0, "a number above 0"),
        ("noop_threshold", float("nan"), "a number, not below 0"),
        ("noop_threshold", "1e-3", "a number, not below 0"),
        ("mask", True, "a list of true and false"),
        ("mask", ["yes", "no"], "a list of true and false"),
        ("language", None, "a text"),
        ("action", [], "a path, or a list of paths"),
        ("state", [3], "a path, or a list of paths"),
        ("drop_first", "no", "true or false"),
        ("swap", ["primary"], "two roles"),
        ("transform", ["a.b"], "a text"),
    ],
)
def test_values_that_mean_nothing_are_refused(option: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.datasets\.mine\.{option}=.*: expected {wanted}"):
        describe("mine", {"cameras": {"primary": "image"}, option: value})
    with pytest.raises(ValueError, match=r"data\.datasets\.mine\.cameras\.wrist=7: expected a key"):
        describe("mine", {"cameras": {"primary": "image", "wrist": 7}})
