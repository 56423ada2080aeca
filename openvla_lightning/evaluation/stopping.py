"""Early stopping of an evaluation, once it is known which of two policies is better on the same scenes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openvla_lightning.env.base import RequestError
from openvla_lightning.evaluation.plan import Plan
from openvla_lightning.report.results import FILE_NAME, Episode, Results
from openvla_lightning.report.sequential import LEVEL, Verdict, capital, judge


class Decided:
    """Compares a policy with existing results, scene by scene, and stops when it is decided which is better.

    Scenes are used in the order of the plan, not in the order in which they end: successes end earlier than failures,
    so the order of ending would favour the new policy.

    Args:
        against: results of the other policy, results.json or its folder.
        margin: differences of the success rates below it do not matter, so that "equally good" is a decision, too;
            None: only a difference decides.

    Raises:
        ValueError: when there are no results of rollouts at `against`.
    """

    def __init__(self, against: str | Path, margin: float | None = None) -> None:
        path = Path(against)
        if not (path / FILE_NAME if path.is_dir() else path).exists():
            raise RequestError(f"eval.against={against}: there are no results; evaluate the other policy first")
        self.other, self.margin = Results.load(path), margin
        self._theirs = {(e.task, e.seed): _score(e) for e in self.other.episodes if e.error is None}
        if not self._theirs:
            raise RequestError(f"eval.against={against} holds no rollouts to compare with")
        self._said: tuple[int, bool] = (-1, False)

    def check(self, plans: Sequence[Plan]) -> None:
        """Check that the other policy has met some of these scenes.

        Raises:
            ValueError: when it has met none of them.
        """
        if not any((plan.task.name, plan.seed) in self._theirs for plan in plans):
            raise RequestError(
                f"{self.other.label} met none of these scenes: evaluate with its seed, {self.other.seed}, and its tasks"
            )

    def reached(self, plans: Sequence[Plan], finished: Mapping[int, Episode]) -> bool:
        """Whether it is decided after these episodes, by their number in the plan."""
        if self._said[0] != len(finished):
            first, second = self._pairs(plans, finished)
            crossed = bool(len(first)) and bool((capital(second - first) >= 1 / LEVEL).any())
            if not crossed and self.margin is not None:
                crossed = self.verdict(plans, finished).decision is not None
            self._said = len(finished), crossed
        return self._said[1]

    def verdict(self, plans: Sequence[Plan], finished: Mapping[int, Episode]) -> Verdict:
        """The verdict after these episodes; `second` is the policy that is being evaluated."""
        return judge(*self._pairs(plans, finished), margin=self.margin)

    def _pairs(self, plans: Sequence[Plan], finished: Mapping[int, Episode]) -> tuple[np.ndarray, np.ndarray]:
        """Scores on the scenes that both met, up to the first unfinished one."""
        pairs = []
        for number, plan in enumerate(plans):
            theirs = self._theirs.get((plan.task.name, plan.seed))
            if theirs is None:
                continue
            if (ours := finished.get(number)) is None:
                break
            if ours.error is None:
                pairs.append((theirs, _score(ours)))
        first, second = np.array(pairs, np.float64).reshape(-1, 2).T
        return first, second


def _score(episode: Episode) -> float:
    """1 for a success, or the completed share of the task for a failure."""
    return 1.0 if episode.success else min(max(episode.progress, 0.0), 1.0)


def shuffled(plans: Sequence[Plan], seed: int) -> list[Plan]:
    """The same episodes in a random order given by `seed`, because the test requires that no task comes first."""
    order = np.random.default_rng(seed).permutation(len(plans))
    return [plans[place] for place in order]
