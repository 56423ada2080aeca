"""Standardisation is the released one; what is unknown is an error that helps."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_sets import LARGEST, cases, manifest, one
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from released import flat, nested, trajectories

from openvla_lightning.data import standardise
from openvla_lightning.data.oxe import (
    UnregisteredDatasetError,
    check_names,
    dataset_spec,
    describe,
    gripper,
    known_datasets,
)
from openvla_lightning.data.oxe.registry import check_encodings
from openvla_lightning.data.oxe.rotations import euler_from_quaternion

ROOT = Path(__file__).parents[2]

OURS = {"tabletop_pretrain", "tabletop_finetune", "tabletop_steady", "tabletop_full"}
OURS |= {f"libero_{suite}_scripted" for suite in ("spatial", "object", "goal", "10")}


@pytest.mark.parametrize(("each_golden", "dataset"), cases(), indirect=["each_golden"])
def test_standardisation_as_released(each_golden: Path, dataset: str) -> None:
    count = 0
    for raw, expected in trajectories(each_golden, dataset):
        result = flat(standardise(dataset, nested(raw)))
        assert set(expected) <= set(result)
        for path, leaf in expected.items():
            if leaf.dtype.kind == "f":
                np.testing.assert_allclose(result[path], leaf, atol=1e-6, rtol=0, err_msg=path)
            else:
                np.testing.assert_array_equal(result[path], leaf, err_msg=path)
        count += 1
    assert count >= 3


def test_every_dataset_has_golden_numbers(golden: Path) -> None:
    assert set(manifest("whole")) == set(known_datasets()) - OURS - {"bridge_dataset"}  # bridge_orig by another name


def test_every_released_dataset_is_known(each_golden: Path) -> None:
    released = json.loads((each_golden / "data" / "oxe_datasets.json").read_text())
    assert set(released["datasets"]) | OURS == set(known_datasets())
    encodings = {"EEF_POS": "eef_pos", "JOINT_POS": "joint_pos"}
    for name, facts in released["datasets"].items():
        spec = dataset_spec(name)
        assert dict(spec.cameras) == facts["image_obs_keys"], name
        assert list(spec.state) == facts["state_obs_keys"], name
        assert spec.encoding == encodings[facts["action_encoding"]], name
        assert spec.zero_filter == (facts["frame_filter"] is not None), name
        if facts["absolute_action_mask"]:
            assert list(spec.absolute_mask(7)) == facts["absolute_action_mask"], name
            assert list(spec.action_mask(7)) == facts["action_normalization_mask"], name


@LARGEST
def test_every_released_mixture_has_its_weights(each_golden: Path) -> None:
    released = json.loads((each_golden / "data" / "oxe_datasets.json").read_text())["mixtures"]
    for name, facts in released.items():
        entries = dict(reversed(facts["entries_in_order"]))  # of duplicates the first counts
        expected = {dataset: w for dataset, w in entries.items() if dataset not in facts["rejected_at_load"]}
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            mix = OmegaConf.to_container(compose("train", ["data=oxe", f"data/mix={name}"]).data.mix)
        assert mix == expected, name


def test_without_its_first_step_bridge_is_as_released_and_with_it_as_octo_has_it(each_golden: Path) -> None:
    arrays = np.load(each_golden / "data" / "bridge" / "golden_bridge.npz")
    lengths = arrays["raw/train/traj_len"]
    octo, released = (arrays[f"{part}/train/EEF_state"] for part in ("octo_no_first_step_trim", "bridge_orig"))
    ends = np.cumsum([0, *lengths])
    whole, trimmed = [], []
    for start, end in pairwise(ends):
        raw = {
            "observation": {"state": arrays["raw/train/state"][start:end]},
            "action": arrays["raw/train/action"][start:end],
        }
        whole.append(dataset_spec("bridge_orig").transform(raw)["observation"]["EEF_state"])
        trimmed.append(standardise("bridge_orig", raw)["observation"]["EEF_state"])
    np.testing.assert_array_equal(np.concatenate(whole), octo)
    np.testing.assert_array_equal(np.concatenate(trimmed), released)


def test_euler_angles_as_released(each_golden: Path) -> None:
    arrays = np.load(one(each_golden / "data" / "transforms", "golden_units_*.npz"))
    ours = euler_from_quaternion(arrays["quat_xyzw_to_euler/in"])
    np.testing.assert_allclose(ours, arrays["quat_xyzw_to_euler/out"], atol=1e-6, rtol=0)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: sum(x * x for x in q) > 0.01))
def test_euler_angles_describe_the_same_rotation(values: list[float]) -> None:
    quaternion = np.array(values) / np.linalg.norm(values)
    x, y, z, w = quaternion
    matrix = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    (a, b, c) = euler_from_quaternion(quaternion.astype(np.float32))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    np.testing.assert_allclose(
        about_z @ about_y @ about_x, matrix, atol=3e-3
    )  # the released arithmetic, near the poles


def test_an_instruction_of_code_points_ends_at_the_first_zero() -> None:
    rows = np.zeros((2, 16), np.int32)
    rows[0, :6] = [ord(c) for c in "déjà 😀"]
    rows[1, :3] = [97, 0, 98]
    raw = {"action": np.ones((2, 2), np.float32), "observation": {"instruction": rows}}
    assert standardise("language_table", raw)["language_instruction"].tolist() == ["déjà 😀".encode(), b"a"]


@pytest.mark.parametrize(("each_golden", "dataset"), cases(), indirect=["each_golden"])
def test_standardising_leaves_its_input_alone(each_golden: Path, dataset: str) -> None:
    raw, _ = next(trajectories(each_golden, dataset))
    before = {path: leaf.copy() for path, leaf in raw.items()}
    standardise(dataset, nested(raw))
    for path, leaf in before.items():
        np.testing.assert_array_equal(raw[path], leaf)


@pytest.mark.parametrize(("unit", "function"), [("rel2abs", gripper.from_relative), ("binarize", gripper.binarise)])
def test_gripper_conversions_as_released(each_golden: Path, unit: str, function) -> None:
    arrays = np.load(one(each_golden / "data" / "transforms", "golden_units_*.npz"))
    ends = np.cumsum([0, *arrays[f"{unit}/len"]])
    for start, end in pairwise(ends):
        given_, expected = arrays[f"{unit}/in"][start:end], arrays[f"{unit}/out"][start:end]
        np.testing.assert_array_equal(function(given_), expected)


positions = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).map(lambda v: np.array(v, np.float32))


@given(positions)
def test_binarise_obeys_its_definition(values: np.ndarray) -> None:
    expected = values[-1]
    out = gripper.binarise(values)
    for value, result in zip(values[::-1], out[::-1], strict=True):
        expected = 1.0 if value > 0.95 else 0.0 if value < 0.05 else expected
        assert result == np.float32(expected)


@given(positions)
def test_gripper_conversions_are_involutions_or_projections(values: np.ndarray) -> None:
    np.testing.assert_allclose(gripper.invert(gripper.invert(values)), values, atol=1e-7)
    relative = gripper.from_relative(values * 2 - 1)
    assert set(relative.tolist()) <= {0.0, 1.0}


def test_unknown_names_come_with_the_nearest_and_the_list() -> None:
    with pytest.raises(
        UnregisteredDatasetError, match=r"'bridge_orgi' \(did you mean 'bridge_orig'.*libero_goal_no_noops"
    ):
        check_names(["bridge_dataset", "bridge_orgi"])
    check_names(["bridge_dataset", "mine"], described=["mine"])
    with pytest.raises(UnregisteredDatasetError):
        standardise("nothing like it", {})


def test_a_described_dataset_joins_its_action_and_checks_its_options() -> None:
    spec = describe("arm", {"cameras": {"primary": "rgb"}, "action": ["delta", "grip"], "language": "task"})
    trajectory = {"delta": np.ones((4, 2)), "grip": np.arange(4), "observation": {}, "task": b"x"}
    action = spec.transform(trajectory)["action"]
    assert action.dtype == np.float32
    assert action.tolist() == [[1, 1, t] for t in range(4)]
    assert spec.action_mask(3) == (True, True, False)
    with pytest.raises(ValueError, match=r"unknown camera; known: .*cameras"):
        describe("arm", {"camera": {"primary": "rgb"}})
    with pytest.raises(ValueError, match="`cameras` maps roles"):
        describe("arm", {"cameras": "rgb"})
    with pytest.raises(ValueError, match="cannot be imported"):
        describe("arm", {"cameras": {"primary": "rgb"}, "transform": "no.such.function"})
    with pytest.raises(ValueError, match="`mask` has 2 entries, its actions have 3"):
        describe("arm", {"cameras": {"primary": "rgb"}, "mask": [True, False]}).action_mask(3)
    with pytest.raises(KeyError, match="no 'grip': the trajectory holds action"):
        spec.transform({"action": np.ones((4, 2)), "delta": np.ones((4, 2)), "observation": {}})


@pytest.mark.parametrize(
    "options",
    [
        {"relative_to": 3, "actions": "delta_from_state"},
        {"relative_to": [0.5, 1, None], "actions": "delta_from_state"},  # once taken for [0, 1, None]
        {"relative_to": [0, True, None], "actions": "delta_from_state"},
        {"gripper": {"open": "wide", "closed": 0}},
        {"gripper": {"open": float("nan"), "closed": 0}},
        {"encoding": ["eef_pos"]},
        None,
        ["rgb"],
    ],
)
def test_options_of_another_form_are_named(options: Any) -> None:
    described = options | {"cameras": {"primary": "rgb"}} if isinstance(options, dict) else options
    with pytest.raises(ValueError, match=r"^data\.datasets\.arm(\.(relative_to|gripper|encoding))?="):
        describe("arm", described)


def test_encodings_say_how_wide_an_action_is_and_do_not_mix() -> None:
    with pytest.raises(ValueError, match="arm: unknown encoding 'eef'; known: eef_pos, eef_r6, joint_pos"):
        describe("arm", {"cameras": {"primary": "rgb"}, "encoding": "eef"})
    arms = describe("arms", {"cameras": {"primary": "rgb"}, "encoding": "joint_pos_bimanual"})
    assert [i for i, normalised in enumerate(arms.action_mask(14)) if not normalised] == [6, 13]
    with pytest.raises(ValueError, match="encoding joint_pos_bimanual means 14 action dimensions, got 7"):
        arms.check_width(7)
    mine = describe("mine", {"cameras": {"primary": "rgb"}})
    mine.check_width(3)
    check_encodings([dataset_spec("kuka"), dataset_spec("droid"), mine])
    with pytest.raises(ValueError, match="different action encodings: eef_pos: kuka; joint_pos_bimanual: arms"):
        check_encodings([dataset_spec("kuka"), arms])
    with pytest.raises(ValueError, match="swap names left; its cameras are primary"):
        describe("arm", {"cameras": {"primary": "rgb"}, "swap": ["primary", "left"]})


def test_the_fingerprint_follows_what_the_reader_makes_of_the_files() -> None:
    one = describe("arm", {"cameras": {"primary": "rgb"}})
    assert one.fingerprint == describe("arm", {"cameras": {"primary": "rgb"}, "where": "a cupboard"}).fingerprint
    assert one.fingerprint != describe("arm", {"cameras": {"primary": "rgb"}, "action": "other"}).fingerprint
    assert dataset_spec("bridge_orig").fingerprint != dataset_spec("libero_10_no_noops").fingerprint


def test_standardise_needs_only_numpy() -> None:
    code = (
        "import sys; from openvla_lightning.data import standardise\n"
        "from openvla_lightning.data.oxe import known_datasets; known_datasets()\n"
        "print(*sorted({'torch', 'lightning', 'tensorflow_datasets', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert loaded.split() == []
