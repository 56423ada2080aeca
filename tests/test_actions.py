"""Bins and ids, against the released tokenizer and by their properties."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openvla_lightning import ActionTokenizer, DatasetStatistics

ACTIONS = arrays(np.float64, st.integers(1, 20), elements=st.floats(-1, 1))


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_released_ids_and_bin_centres(each_golden: Path, precision: str) -> None:
    expected = np.load(each_golden / "model" / "action_tokenizer.npz")
    tokenizer = ActionTokenizer()
    ids = tokenizer.encode(expected[f"actions_{precision}"])
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, expected[f"token_ids_{precision}"])
    np.testing.assert_array_equal(tokenizer.decode(ids), expected[f"decoded_{precision}"])
    np.testing.assert_array_equal(tokenizer.decode(expected["all_token_ids"]), expected["all_decoded"])


def test_unnormalised_actions(each_golden: Path) -> None:
    expected = np.load(each_golden / "model" / "action_tokenizer.npz")
    for key, stats in json.loads((each_golden / "model" / "action_norm_stats.json").read_text()).items():
        normalised = ActionTokenizer().decode(expected[f"unnorm/{key}/token_ids"])
        actions = DatasetStatistics.from_dict(stats).unnormalise(normalised)
        np.testing.assert_allclose(actions, expected[f"unnorm/{key}/actions"], atol=1e-9, rtol=0)


@given(ACTIONS, st.integers(2, 256), st.integers(300, 200_000))
def test_round_trip_stays_within_half_a_bin(actions: np.ndarray, bins: int, vocab_size: int) -> None:
    tokenizer = ActionTokenizer(vocab_size, bins)
    ids = tokenizer.encode(actions)
    assert (ids >= tokenizer.first_id).all()
    assert (ids < vocab_size).all()
    assert np.abs(tokenizer.decode(ids) - actions).max() <= 1 / (bins - 1) + 1e-12


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_larger_actions_never_have_larger_ids(a: float, b: float) -> None:
    low, high = ActionTokenizer().encode([min(a, b), max(a, b)])
    assert low >= high


def test_more_bins_than_words_are_refused() -> None:
    with pytest.raises(ValueError, match="bins"):
        ActionTokenizer(vocab_size=100, bins=256)
