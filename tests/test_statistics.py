"""Statistics are the released ones, and un-normalising undoes normalising."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_sets import one
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openvla_lightning.statistics import DatasetStatistics, choose_key

METHODS = {"quantile": "bounds_q99", "minmax": "bounds", "meanstd": "normal"}
MASK = [True] * 6 + [False]
actions = hnp.arrays(np.float32, st.tuples(st.integers(2, 40), st.just(3)), elements=st.floats(-9, 9, width=32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["action", "proprio"])
def test_normalise_bit_for_bit_as_released(each_golden: Path, method, part) -> None:
    arrays = np.load(one(each_golden / "data" / "transforms", "golden_units_*.npz"))
    stored = {
        name: {key.split("/")[-1]: arrays[key] for key in arrays.files if key.startswith(f"normalise/stats/{name}/")}
        for name in ("action", "proprio")
    }
    out = DatasetStatistics.from_dict(stored).normalise(arrays[f"normalise/{part}_in"], method, part)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, arrays[f"normalise/{METHODS[method]}/{part}_out"])


def test_measured_on_bridge_as_released(each_golden: Path) -> None:
    arrays = np.load(each_golden / "data" / "bridge" / "golden_bridge.npz")
    stored = json.loads((each_golden / "data" / "bridge" / "golden_bridge.json").read_text())["bridge_orig_statistics"]
    steps = [arrays[f"bridge_orig/{split}/action_unnormalised"] for split in ("train", "val")]
    count = stored["num_trajectories"]
    measured = DatasetStatistics.from_array(np.concatenate(steps), mask=MASK, num_trajectories=count)
    released = DatasetStatistics.from_dict(stored)
    for name in ("q01", "q99", "min", "max", "mask"):
        np.testing.assert_array_equal(measured.action[name], released.action[name], err_msg=name)
    for name in ("mean", "std"):  # the order of a float32 sum is not part of the recipe
        np.testing.assert_allclose(measured.action[name], released.action[name], rtol=1e-6, err_msg=name)
    assert measured.num_transitions == stored["num_transitions"]
    for split, released_steps in zip(("train", "val"), steps, strict=True):
        for method, name in METHODS.items():
            ours = released.normalise(released_steps, method)
            np.testing.assert_array_equal(ours, arrays[f"bridge_orig/{split}/action_{name}"])


def test_unnormalise_as_released(each_golden: Path) -> None:
    path = each_golden / "model" / "action_norm_stats.json"
    stored = json.loads(path.read_text())
    for key, values in stored.items():
        statistics = DatasetStatistics.from_json(path, key)
        low, high = (np.array(values["action"][name]) for name in ("q01", "q99"))
        mask = np.array(values["action"].get("mask", [True] * len(low)))
        bins = np.random.default_rng(0).uniform(-1, 1, (50, len(low)))
        expected = np.where(mask, 0.5 * (bins + 1) * (high - low) + low, bins)
        np.testing.assert_allclose(statistics.unnormalise(bins), expected, rtol=0, atol=1e-15)
        assert statistics.unnormalise(bins).dtype == np.float64


@given(actions, st.sampled_from(list(METHODS)))
def test_unnormalise_undoes_normalise(steps: np.ndarray, method) -> None:
    statistics = DatasetStatistics.from_array(steps, mask=[True, True, False])
    low, high = {"quantile": ("q01", "q99")}.get(method, ("min", "max"))
    span = statistics.action[high] - statistics.action[low]
    back = statistics.unnormalise(statistics.normalise(steps, method), method)
    expected = np.clip(steps, statistics.action[low], statistics.action[high]) if method != "meanstd" else steps
    wide = (span > 1e-3) & [True, True, False]
    np.testing.assert_allclose(back[:, wide], expected[:, wide], atol=1e-4)
    if method == "meanstd" or statistics.action["min"][2] < statistics.action["max"][2]:
        np.testing.assert_array_equal(back[:, 2], steps[:, 2])


@given(actions)
def test_normalised_values_lie_in_bounds_and_constants_become_zero(steps: np.ndarray) -> None:
    steps = np.concatenate([steps, np.full((len(steps), 1), 3.0, np.float32)], axis=1)
    out = DatasetStatistics.from_array(steps, mask=[True, True, True, False]).normalise(steps)
    assert np.abs(out[:, :3]).max() <= 1
    assert not out[:, 3].any()


@given(actions)
def test_json_round_trip_is_exact(tmp_path_factory, steps: np.ndarray) -> None:
    statistics = DatasetStatistics.from_array(steps, proprio=steps, num_trajectories=2)
    path = tmp_path_factory.mktemp("json") / "statistics.json"
    path.write_text(json.dumps({"mine": statistics.to_dict()}))
    assert DatasetStatistics.from_json(path) == statistics
    path.write_text(json.dumps(statistics.to_dict()))
    assert DatasetStatistics.from_json(path) == statistics


@given(actions, actions)
def test_merging_pools_moments_and_widens_bounds(one: np.ndarray, two: np.ndarray) -> None:
    parts = [DatasetStatistics.from_array(steps) for steps in (one, two)]
    merged = parts[0].merge(parts[1])
    union = DatasetStatistics.from_array(np.concatenate([one, two]))
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(merged.action[name], union.action[name], atol=2e-3, err_msg=name)
    for name, widest in (("q01", np.minimum), ("q99", np.maximum)):
        np.testing.assert_array_equal(merged.action[name], widest(*(part.action[name] for part in parts)))
    assert merged.num_transitions == len(one) + len(two)


def test_keys_are_chosen_or_listed(tmp_path: Path) -> None:
    one = DatasetStatistics.from_array(np.eye(3)).to_dict()
    path = tmp_path / "dataset_statistics.json"
    path.write_text(json.dumps({"bridge_orig": one, "kuka": one}))
    with pytest.raises(KeyError, match="pass unnorm_key as one of bridge_orig, kuka"):
        DatasetStatistics.from_json(path)
    with pytest.raises(KeyError, match="did you mean 'bridge_orig'"):
        DatasetStatistics.from_json(path, "bridge_org")
    path.write_text(json.dumps({"model_type": "openvla", "norm_stats": {"kuka": one}}))
    assert DatasetStatistics.from_json(path).to_dict() == one


def test_wrong_input_is_named() -> None:
    statistics = DatasetStatistics.from_array(np.eye(3))
    with pytest.raises(ValueError, match="expected 3 action dimensions"):
        statistics.normalise(np.zeros(4))
    with pytest.raises(ValueError, match="choose quantile, minmax or meanstd"):
        statistics.normalise(np.zeros(3), "quantiles")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step 1 is not finite"):
        DatasetStatistics.from_array([[0.0], [np.nan]])
    with pytest.raises(ValueError, match="need actions of shape"):
        DatasetStatistics.from_array(np.zeros((0, 7)))
    with pytest.raises(ValueError, match="mask has 2 entries"):
        DatasetStatistics.from_array(np.eye(3), mask=[True, False])
    with pytest.raises(ValueError, match="2 and 3 action dimensions"):
        statistics.merge(DatasetStatistics.from_array(np.eye(2)))


@pytest.mark.parametrize(
    ("key", "known", "found"),
    [
        ("libero_spatial", ["libero_spatial_no_noops", "bridge_orig"], "libero_spatial_no_noops"),
        ("libero_spatial_no_noops", ["libero_spatial", "bridge_orig"], "libero_spatial"),
        ("libero_long", ["libero_10_no_noops", "libero_goal_no_noops"], "libero_10_no_noops"),
        ("libero_10", ["libero_10_no_noops", "libero_90_no_noops"], "libero_10_no_noops"),
        ("bridge_v2", ["bridge_orig", "bridge_oxe"], "bridge_orig"),
        ("rt_1", ["bridge_orig", "fractal20220817_data"], "fractal20220817_data"),
        ("bridge_oxe", ["bridge_orig", "bridge_oxe"], "bridge_oxe"),
    ],
)
def test_usual_names_of_a_dataset_are_understood(key: str, known: list[str], found: str) -> None:
    assert choose_key(dict.fromkeys(known), key) == found


def test_no_name_is_needed_for_what_was_trained_on_last() -> None:
    assert choose_key({"a": {}}, None) == "a"
    assert choose_key({"a": {"latest": False}, "b": {"latest": True}, "c": {}}, None) == "b"
    for several in ({"a": {}, "b": {}}, {"a": {"latest": True}, "b": {"latest": True}}, {}):
        with pytest.raises(KeyError, match="pass unnorm_key"):
            choose_key(several, None)


@pytest.mark.parametrize("key", ["libero_goal", "bridge_oxe", "libero", ""])
def test_a_name_of_another_dataset_is_no_alias(key: str) -> None:
    with pytest.raises(KeyError, match="known: bridge_orig, libero_spatial_no_noops"):
        choose_key(dict.fromkeys(["bridge_orig", "libero_spatial_no_noops"]), key)
