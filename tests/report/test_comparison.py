"""Paired comparisons: exact values, no false alarms, and the power they are said to have."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.report.comparison import bootstrap, compare_all, holm, mcnemar, power, task_mean
from openvla_lightning.report.results import Episode, Results


def evaluated(label: str, outcomes: np.ndarray, seed: int = 0) -> Results:
    """Results of tasks (rows) by initial states (columns)."""
    episodes = [
        Episode(f"task_{task}", "family", number, "words", bool(success), 10)
        for task, row in enumerate(outcomes)
        for number, success in enumerate(row)
    ]
    return Results(label, "world", seed=seed, episodes=episodes)


def test_mcnemar_against_exact_values():
    # Two-sided binomial tests of 5 of 30, 1 of 8, 0 of 6.
    assert mcnemar(5, 25) == pytest.approx(0.000325, abs=1e-6)
    assert mcnemar(1, 7) == pytest.approx(18 / 256)
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0


def test_mcnemar_of_thousands_of_pairs_is_exact_and_soon_there():
    some = 2 * sum(math.comb(1500, k) for k in range(701)) / 2**1500
    assert mcnemar(700, 800) == some
    assert mcnemar(9_900, 10_100) == pytest.approx(math.erfc(199 / math.sqrt(2 * 20_000)), rel=1e-2)


@pytest.mark.parametrize("pairs", [0, 1, 5, 6, 7, 40])
def test_the_power_is_that_of_every_outcome_there_can_be(pairs):
    chances = [0.55 * 0.3, 0.45 * 0.7, 1 - 0.55 * 0.3 - 0.45 * 0.7]  # only the first, only the second, alike
    every = 0.0
    for worse in range(pairs + 1):
        for better in range(pairs + 1 - worse):
            if mcnemar(worse, better) < 0.05:
                ways = math.comb(pairs, worse) * math.comb(pairs - worse, better)
                every += ways * chances[0] ** worse * chances[1] ** better * chances[2] ** (pairs - worse - better)
    assert power(0.55, 0.70, pairs) == pytest.approx(every, abs=1e-9)


def test_the_power_of_thousands_of_pairs_is_soon_there():
    assert 0.999 < power(0.55, 0.70, 4000) <= 1 + 1e-9


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_symmetric_and_a_probability(a, b):
    assert mcnemar(a, b) == mcnemar(b, a)
    assert 0 < mcnemar(a, b) <= 1


def test_a_checkpoint_does_not_differ_from_itself():
    outcomes = np.random.default_rng(0).random((10, 20)) < 0.7
    (found,) = compare_all({"a": [evaluated("a", outcomes)], "b": [evaluated("b", outcomes)]})
    assert (found.pairs, found.difference, found.interval, found.p_value) == (200, 0.0, (0.0, 0.0), 1.0)
    assert not found.significant


def test_a_planted_difference_is_found_as_often_as_the_power_says():
    random = np.random.default_rng(1)
    found, false_alarms, rounds = 0, 0, 200
    for _ in range(rounds):
        worse, better, same = (random.random(200) < rate for rate in (0.55, 0.70, 0.70))
        found += mcnemar(int((worse & ~better).sum()), int((better & ~worse).sum())) < 0.05
        false_alarms += mcnemar(int((same & ~better).sum()), int((better & ~same).sum())) < 0.05
    stated = power(0.55, 0.70, 200)
    assert stated > 0.8
    assert abs(found / rounds - stated) < 3 * (stated * (1 - stated) / rounds) ** 0.5
    assert false_alarms / rounds < 0.09
    assert power(0.7, 0.7, 200) < 0.05
    assert power(0.55, 0.70, 100) < stated < power(0.55, 0.70, 400)


def test_pairs_are_initial_states_that_both_met():
    outcomes = np.random.default_rng(2).random((3, 8)) < 0.5
    first = [evaluated("a", outcomes), evaluated("a", outcomes, seed=1)]
    second = [evaluated("b", ~outcomes[:2, :5]), evaluated("b", ~outcomes, seed=2)]
    second[0].episodes[0] = Episode("task_0", "family", 0, "words", False, 0, error="burnt out")
    (found,) = compare_all({"a": first, "b": second})
    assert found.pairs == 9
    assert found.only_first + found.only_second == 9
    assert compare_all({"a": first, "c": [evaluated("c", outcomes, seed=7)]}) == []


def test_bootstrap_covers_the_truth_and_knows_that_tasks_differ():
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        rates = random.beta(4, 2, size=10)
        low, high = bootstrap([(random.random(20) < rate).astype(float) for rate in rates], draws=500)
        covered += low <= 4 / 6 <= high
    assert covered >= 50
    alike = bootstrap([np.repeat([0.0, 1.0], 20)] * 10)
    apart = bootstrap([np.zeros(40)] * 5 + [np.ones(40)] * 5)
    assert apart[1] - apart[0] > 2 * (alike[1] - alike[0])
    assert bootstrap([np.ones(5)]) == (1.0, 1.0)


def test_the_mean_is_over_tasks_and_pools_seeds():
    results = [evaluated("a", np.array([[1, 1, 1, 1], [0, 0, 0, 0]])), evaluated("a", np.ones((1, 4)), seed=1)]
    mean, (low, high) = task_mean(results)
    assert mean == 0.5
    assert low <= 0.5 <= high


def test_many_comparisons_are_corrected():
    policies = {f"p{i}": [evaluated(f"p{i}", np.random.default_rng(i).random((1, 60)) < 0.5)] for i in range(5)}
    comparisons = compare_all(policies)
    assert len(comparisons) == 10
    assert not any(comparison.significant for comparison in comparisons)
    alone = [mcnemar(c.only_first, c.only_second) for c in comparisons]
    assert all(c.p_value >= p for c, p in zip(comparisons, alone, strict=True))
    assert holm([]) == []
