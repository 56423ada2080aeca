"""Whether a policy follows instructions: its error on each task's steps with each task's instruction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from openvla_lightning.policy import Policy
from openvla_lightning.types import Step

TASKS, STEPS = 8, 16
"""Largest numbers of compared instructions, and of steps of each."""


class Confusion:
    """Collects steps of one dataset, and swaps their instructions.

    A policy that follows instructions has its smallest error with the step's own instruction. A policy that only looks
    at pictures has the same error with every instruction.
    """

    def __init__(self) -> None:
        self.steps: dict[str, list[Step]] = {}

    def add(self, steps: Sequence[Step]) -> None:
        """Keep the needed steps of a batch."""
        for step in steps:
            kept = self.steps.setdefault(step.observation.instruction, [])
            if len(kept) < STEPS:
                kept.append(step)

    def measure(self, policy: Policy) -> dict[str, Any] | None:
        """Errors with the most frequent instructions; None if there is only one.

        Returns:
            `tasks`: the instructions; `l1`: errors on each task's steps (rows) with each task's instruction (columns),
            in normalised units, under the true past; `own_is_best`: share of rows whose own instruction gives the
            smallest error.
        """
        tasks = sorted(self.steps, key=lambda task: -len(self.steps[task]))[:TASKS]
        if len(tasks) < 2:
            return None
        errors = np.array([[_error(policy, self.steps[task], instruction) for instruction in tasks] for task in tasks])
        own_is_best = errors.argmin(axis=1) == np.arange(len(tasks))
        return {"tasks": tasks, "l1": errors.tolist(), "own_is_best": float(own_is_best.mean())}


def _error(policy: Policy, steps: Sequence[Step], instruction: str) -> float:
    return float(policy.predict([_with_instruction(step, instruction) for step in steps]).error.mean())


def _with_instruction(step: Step, instruction: str) -> Step:
    return replace(step, observation=replace(step.observation, instruction=instruction))
