"""Stopping when it is decided: false alarms, coverage, and what early stopping saves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvla_lightning.report.sequential import capital, interval, judge, simulate


@pytest.mark.parametrize("rates", [([0.5], [0.5]), ([0.9, 0.1], [0.1, 0.9])], ids=["one task", "tasks that differ"])
@pytest.mark.parametrize("partial", [0.0, 0.5])
def test_equal_policies_are_told_apart_in_five_percent_at_most(
    rates: tuple[list[float], list[float]], partial: float
) -> None:
    found = simulate(*rates, comparisons=2000, pairs=100, partial=partial)
    assert found.decided <= 0.05


def test_a_difference_is_found_sooner_than_at_a_fixed_size() -> None:
    found = simulate([0.5], [0.8], comparisons=300, pairs=200)
    assert found.decided > 0.95
    assert found.wrong < 0.01
    assert found.mean_pairs < 0.5 * 200


def test_the_interval_covers_the_truth_at_every_look() -> None:
    random, missed = np.random.default_rng(1), 0
    for _ in range(200):
        differences = (random.random(80) < 0.7).astype(float) - (random.random(80) < 0.5)
        missed += capital(differences, 0.2).max() >= 20
    assert missed <= 0.05 * 200 + 5


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_exchanging_the_policies_exchanges_the_verdict(pairs: list[tuple[float, float]]) -> None:
    first, second = (list(side) for side in zip(*pairs, strict=True))
    one, other = judge(first, second), judge(second, first)
    assert one.difference == pytest.approx(-other.difference)
    assert one.capital == pytest.approx(other.capital)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.interval[0] <= one.difference + 0.02
    assert one.difference - 0.02 <= one.interval[1]
    assert other.decision == {"first": "second", "second": "first", None: None}[one.decision]
    assert (capital(np.array(second) - np.array(first)) > 0).all(), "nobody is ever ruined"


def test_a_decision_stays_and_partial_credit_counts() -> None:
    clear = judge([0.0] * 12, [1.0] * 12)
    assert clear.decision == "second"
    assert clear.p_value < 0.05
    assert "the second is better after 12 scenes" in str(clear)
    assert judge([0.0] * 12 + [1.0] * 12, [1.0] * 12 + [0.0] * 12).decision == "second", "later looks undo nothing"
    assert judge([0.2] * 60, [0.6] * 60).decision == "second", "success alone would see no difference"
    assert judge([], []).decision is None


def test_no_difference_that_matters_is_a_decision_too() -> None:
    random = np.random.default_rng(0)
    scores = (random.random(400) < 0.9).astype(float)
    assert judge(scores, scores, margin=0.1).decision == "same"
    assert judge(scores[:8], scores[:8], margin=0.1).decision is None
    low, high = interval(np.zeros(400))
    assert -0.1 < low < 0 < high < 0.1


def test_bad_scores_are_told() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        judge([1.0], [])
    with pytest.raises(ValueError, match="between 0 and 1"):
        judge([2.0], [0.0])
