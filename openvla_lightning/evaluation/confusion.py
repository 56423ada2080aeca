"""Does a policy listen? Its error on each task's steps when it is told each task's words."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from openvla_lightning.policy import Policy
from openvla_lightning.types import Step

TASKS, STEPS = 8, 16
"""How many instructions are compared at most, and how many steps of each."""


class Confusion:
    """Collects steps of one dataset, and swaps their instructions.

    A policy that listens makes its smallest error when it is told the step's own words; one that looks at pictures
    alone makes the same error whatever it is told.
    """

    def __init__(self) -> None:
        self.steps: dict[str, list[Step]] = {}

    def add(self, steps: Sequence[Step]) -> None:
        """Keep what is needed of a batch."""
        for step in steps:
            kept = self.steps.setdefault(step.observation.instruction, [])
            if len(kept) < STEPS:
                kept.append(step)

    def measure(self, policy: Policy) -> dict[str, Any] | None:
        """Errors of the instructions that came most often; None where there is but one.

        Returns:
            `tasks`: the instructions; `l1`: of each task's steps (rows) when told each task's words (columns),
            normalised units, under the true past; `own_is_best`: share of rows whose
            own words do best.
        """
        tasks = sorted(self.steps, key=lambda task: -len(self.steps[task]))[:TASKS]
        if len(tasks) < 2:
            return None
        errors = np.array([[_error(policy, self.steps[task], told) for told in tasks] for task in tasks])
        own = errors.argmin(axis=1) == np.arange(len(tasks))
        return {"tasks": tasks, "l1": errors.tolist(), "own_is_best": float(own.mean())}


def _error(policy: Policy, steps: Sequence[Step], told: str) -> float:
    return float(policy.predict([_told(step, told) for step in steps]).error.mean())


def _told(step: Step, instruction: str) -> Step:
    return replace(step, observation=replace(step.observation, instruction=instruction))
