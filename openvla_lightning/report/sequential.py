"""Stop an evaluation when it is decided: paired tests that may be looked at after every scene and stay honest.

A test made for a fixed number of scenes gives false alarms when it is looked at again and again. These bet instead: two
policies meet the same scenes, and somebody who believes that one is better stakes a share of a capital on each
difference. If neither is better, the capital exceeds 20 at any time with a chance of 5 % at most (Ville's inequality),
so a capital of 20 is a decision, whenever it comes. Bets are on outcomes between 0 and 1, so partial credit counts
(Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Chance of a false alarm, over all looks together."""

Decision = Literal["first", "second", "same"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the scenes so far say of two policies.

    Attributes:
        pairs: scenes that both met.
        difference: mean score of the second less that of the first, -1 to 1.
        interval: of `difference`, with a coverage of 95 % over all looks together.
        capital: the largest that betting on a difference has made of 1; its inverse is a p-value for all looks.
        decision: which policy is better, that they are the `same` within the margin, or None: not yet known.
    """

    pairs: int
    difference: float
    interval: tuple[float, float]
    capital: float
    decision: Decision | None

    @property
    def p_value(self) -> float:
        return min(1.0, 1 / self.capital)

    def __str__(self) -> str:
        low, high = self.interval
        said = {
            None: "not decided",
            "first": "the first is better",
            "second": "the second is better",
            "same": "no difference that matters",
        }[self.decision]
        return f"{said} after {self.pairs} scenes: {self.difference:+.2f} ({low:+.2f} to {high:+.2f})"


def judge(
    first: Sequence[float] | NDArray[np.float64],
    second: Sequence[float] | NDArray[np.float64],
    margin: float | None = None,
    level: float = LEVEL,
) -> Verdict:
    """Judge the scores of two policies on the same scenes, in the order in which the scenes were planned.

    The order must not depend on the outcomes: scenes whose episodes end early, as successes do, must not come first.

    Args:
        first, second: scores in [0, 1], success or partial credit, one per scene.
        margin: differences below it do not matter; None: only a difference can be decided.
        level: chance of a false alarm.

    Raises:
        ValueError: for scores outside [0, 1], or not as many of one as of the other.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores are no pairs")
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if not len(differences):
        return Verdict(0, 0.0, (-1.0, 1.0), 1.0, None)
    if not all(((scores := np.asarray(side)) >= 0).all() and (scores <= 1).all() for side in (first, second)):
        raise ValueError("scores must be between 0 and 1")
    low, high = interval(differences, level)
    capitals = capital(differences)
    decision: Decision | None = None
    if capitals.max() >= 1 / level:  # who was ahead when it was decided stays so: later scenes do not undo it
        when = int((capitals >= 1 / level).argmax()) + 1
        decision = "second" if differences[:when].sum() > 0 else "first"
    elif margin is not None and -margin <= low and high <= margin:
        decision = "same"
    return Verdict(len(differences), float(differences.mean()), (low, high), float(capitals.max()), decision)


def capital(differences: NDArray[np.float64], mean: float = 0.0) -> NDArray[np.float64]:
    """What betting against `mean` has made of 1 after each difference: [..., n] -> [..., n].

    The capital is spread evenly over fixed stakes in both directions, so nothing has to be tuned or predicted.

    Args:
        differences: each in [-1, 1], the last axis in time.
        mean: the mean that is bet against, strictly between -1 and 1.
    """
    up, down = _stakes() / (1 + mean), _stakes() / (1 - mean)  # the largest stakes that no outcome can ruin
    moved = differences[..., None] - mean
    logarithms = np.concatenate([np.log1p(moved * up), np.log1p(-moved * down)], axis=-1).cumsum(axis=-2)
    largest = logarithms.max(axis=-1)
    return np.exp(largest.clip(max=700)) * np.exp(logarithms - largest[..., None]).mean(axis=-1)


def interval(differences: NDArray[np.float64], level: float = LEVEL, grid: int = 200) -> tuple[float, float]:
    """The means that betting has not ruled out at any time so far: a confidence interval for all looks together."""
    means = np.linspace(-1, 1, grid + 1)[1:-1]
    open_ = np.array([capital(differences, mean).max() < 1 / level for mean in means])
    if not open_.any():
        mean = float(np.clip(differences.mean(), -1, 1))
        return mean, mean
    step = 2 / grid
    low, high = means[open_.argmax()] - step, means[len(means) - 1 - open_[::-1].argmax()] + step
    return max(-1.0, float(low)), min(1.0, float(high))


@cache
def _stakes(count: int = 24) -> NDArray[np.float64]:
    """Shares of the capital, from cautious to bold; evenly spread, so that no guess of the difference is needed."""
    return (np.arange(count) + 0.5) / count


@dataclass(frozen=True, slots=True)
class Simulated:
    """How the rule fared over many simulated comparisons.

    Attributes:
        decided: share in which a difference was found, right or wrong: power, or, of equal policies, false alarms.
        wrong: share in which the worse policy was found to be better.
        mean_pairs: scenes a comparison took.
        fixed: share in which one test at the end (McNemar's, on success alone) finds a difference.
    """

    decided: float
    wrong: float
    mean_pairs: float
    fixed: float


def simulate(
    first: Sequence[float],
    second: Sequence[float],
    comparisons: int = 2000,
    pairs: int = 300,
    partial: float = 0.0,
    level: float = LEVEL,
    seed: int = 0,
) -> Simulated:
    """Play comparisons of two policies with known success rates, tasks in random order.

    Args:
        first, second: success rate of each task.
        comparisons: how many to play.
        pairs: scenes at most.
        partial: failures are credited with a uniform share of the task up to this.
        level: chance of a false alarm.
        seed: of the outcomes.
    """
    from openvla_lightning.report.comparison import mcnemar

    random = np.random.default_rng(seed)
    rates = np.array([first, second])
    decided = wrong = fixed = total = 0
    for _ in range(comparisons):
        tasks = random.integers(rates.shape[1], size=pairs)
        success = random.random((2, pairs)) < rates[:, tasks]
        scores = np.where(success, 1.0, random.random((2, pairs)) * partial)
        differences = scores[1] - scores[0]
        capitals = capital(differences)
        crossed = capitals >= 1 / level
        end = int(crossed.argmax()) + 1 if crossed.any() else pairs
        total += end
        if crossed.any():
            decided += 1
            wrong += bool((differences[:end].sum() > 0) != (rates[1].mean() > rates[0].mean()))
        worse, better = int((success[0] & ~success[1]).sum()), int((success[1] & ~success[0]).sum())
        fixed += mcnemar(worse, better) < level
    return Simulated(decided / comparisons, wrong / comparisons, total / comparisons, fixed / comparisons)
