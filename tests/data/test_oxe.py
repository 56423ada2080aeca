"""Standardisation is the released one; what is unknown is an error that helps."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from released import flat, nested, trajectories

from openvla_lightning.data import standardise
from openvla_lightning.data.oxe import UnknownDatasetError, check_names, dataset_spec, describe, gripper, known_datasets

OURS = {
    "tabletop_pretrain",
    "tabletop_finetune",
    "tabletop_full",
    "bridge_dataset",
}  # the last: same function as bridge_orig


@pytest.mark.parametrize("dataset", sorted(set(known_datasets()) - OURS))
def test_standardisation_as_released(golden: Path, dataset: str) -> None:
    count = 0
    for raw, expected in trajectories(golden, dataset):
        result = flat(standardise(dataset, nested(raw)))
        assert set(expected) <= set(result)
        for path, leaf in expected.items():
            if leaf.dtype.kind == "f":
                np.testing.assert_allclose(result[path], leaf, atol=1e-6, rtol=0, err_msg=path)
            else:
                np.testing.assert_array_equal(result[path], leaf, err_msg=path)
        count += 1
    assert count >= 3


@pytest.mark.parametrize(("unit", "function"), [("rel2abs", gripper.from_relative), ("binarize", gripper.binarise)])
def test_gripper_conversions_as_released(golden: Path, unit: str, function) -> None:
    arrays = np.load(golden / "data" / "transforms" / "golden_units_A.npz")
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
    with pytest.raises(UnknownDatasetError, match=r"'bridge_orgi' \(did you mean 'bridge_orig'.*libero_goal_no_noops"):
        check_names(["bridge_dataset", "bridge_orgi"])
    check_names(["bridge_dataset", "mine"], described=["mine"])
    with pytest.raises(UnknownDatasetError):
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
