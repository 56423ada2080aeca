"""Whether one policy is better than another: paired by initial state, with intervals that tasks and scenes move."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from openvla_lightning.report.results import Results, SuccessRate

DRAWS = 4000
SIGNIFICANT = 0.05

Scene = tuple[Any, str, int]
"""What two policies meet alike: the evaluation's seed (over several trainings theirs, too), task, episode's seed."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two policies over the initial states that both met.

    Attributes:
        first, second: their names.
        pairs: initial states both met.
        only_first, only_second: of these, where only the one succeeded.
        difference: success rate of the second less that of the first, as the mean over tasks, -1 to 1.
        interval: 95 % bootstrap interval of `difference`, tasks and their scenes drawn anew.
        p_value: of McNemar's exact test; in a list of comparisons, after Holm's correction.
    """

    first: str
    second: str
    pairs: int
    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float

    @property
    def significant(self) -> bool:
        return self.p_value < SIGNIFICANT


def compare_all(groups: Mapping[str, Sequence[Results]]) -> list[Comparison]:
    """Every pair of policies that met the same scenes, p-values corrected for their number (Holm 1979).

    Args:
        groups: name -> this policy's evaluations, one per seed.
    """
    outcomes = {name: scenes(results) for name, results in groups.items()}
    found = [compare_two(a, outcomes[a], b, outcomes[b]) for a, b in combinations(outcomes, 2)]
    return holm([comparison for comparison in found if comparison.pairs])


def scenes(results: Iterable[Results]) -> dict[Scene, bool]:
    """Success by initial state; episodes that ended in an error are left out."""
    return {(r.seed, e.task, e.seed): e.success for r in results for e in r.episodes if e.error is None}


def compare_two(first: str, before: Mapping[Scene, bool], second: str, after: Mapping[Scene, bool]) -> Comparison:
    """Compare over the initial states that both met."""
    tasks: dict[str, list[int]] = {}
    for scene in sorted(before.keys() & after.keys()):
        tasks.setdefault(scene[1], []).append(int(after[scene]) - int(before[scene]))
    groups = [np.array(differences) for differences in tasks.values()]
    every = np.concatenate(groups) if groups else np.array([], int)
    worse, better = int((every < 0).sum()), int((every > 0).sum())
    mean = float(np.mean([group.mean() for group in groups])) if groups else 0.0
    interval = bootstrap(groups) if groups else (-1.0, 1.0)
    return Comparison(first, second, len(every), worse, better, mean, interval, mcnemar(worse, better))


def mcnemar(worse: int, better: int) -> float:
    """Two-sided exact p-value (McNemar 1947): were both as likely, how often would they differ by this much?"""
    n = worse + better
    ways = tail = 1  # to choose k of n: each from the one before, as anew they take hours for thousands of pairs
    for k in range(min(worse, better)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * (tail / 2**n))


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Raise p-values so that all together give a false alarm in 5 % of cases at most."""
    order = sorted(range(len(comparisons)), key=lambda i: comparisons[i].p_value)
    corrected, highest = list(comparisons), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, comparisons[index].p_value * (len(order) - rank)))
        corrected[index] = replace(comparisons[index], p_value=highest)
    return corrected


def bootstrap(groups: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over tasks of their means: tasks are drawn anew, and in each its episodes.

    Args:
        groups: one array of outcomes per task.
    """
    random = np.random.default_rng(seed)
    means = np.zeros(draws)
    for _ in groups:
        chosen = random.integers(len(groups), size=draws)
        for index in np.unique(chosen):
            members, here = groups[index], np.flatnonzero(chosen == index)
            means[here] += members[random.integers(len(members), size=(len(here), len(members)))].mean(axis=1)
    low, high = np.quantile(means / len(groups), [0.025, 0.975])
    return float(low), float(high)


def task_mean(results: Iterable[Results]) -> tuple[float, tuple[float, float]]:
    """Success rate as the mean over tasks, all seeds of each together, and its bootstrap interval.

    Where all outcomes are alike, drawing them anew would claim certainty: then it is their Wilson interval.
    """
    tasks: dict[str, list[bool]] = {}
    for (_, task, _), success in scenes(results).items():
        tasks.setdefault(task, []).append(success)
    groups = [np.array(outcomes, float) for outcomes in tasks.values()]
    if not groups:
        return float("nan"), (0.0, 1.0)
    mean, every = float(np.mean([group.mean() for group in groups])), np.concatenate(groups)
    alike = len(set(every.tolist())) == 1
    return mean, SuccessRate(int(every.sum()), len(every)).interval if alike else bootstrap(groups)


@cache
def power(first: float, second: float, pairs: int) -> float:
    """How often McNemar's test finds that two policies with these success rates differ, over `pairs` initial states.

    Their outcomes are taken to be independent. Policies that agree more often than that need fewer states.
    """
    only_first, only_second = first * (1 - second), second * (1 - first)
    total = 0.0
    for differing in range(pairs + 1):
        chance = _binomial(pairs, differing, only_first + only_second)
        if chance < 1e-12:
            continue
        share = only_first / (only_first + only_second)
        total += chance * sum(
            _binomial(differing, worse, share) + _binomial(differing, differing - worse, share)
            for worse in range(_even(differing))
        )
    return total


def _even(n: int) -> int:
    """The smallest k for which k against n - k is no more than chance."""
    return bisect_left(range(n // 2 + 1), True, key=lambda k: mcnemar(k, n - k) >= SIGNIFICANT)


def _binomial(n: int, k: int, p: float) -> float:
    if p in (0.0, 1.0):
        return float(k == n * p)
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    return math.exp(log)
