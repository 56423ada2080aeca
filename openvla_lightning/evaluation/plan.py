"""The plan of an evaluation: its episodes, their scenes and their instructions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from openvla_lightning.env.base import EVALUATION_SEEDS, RequestError, Task

INSTRUCTIONS = ("own", "shuffled")


@dataclass(frozen=True, slots=True)
class Plan:
    """One episode to roll out. `instruction` None: the environment's own instruction."""

    task: Task
    seed: int
    instruction: str | None = None


def plan_episodes(
    tasks: Iterable[Task], episodes_per_task: int, seed: int = 0, instructions: str = "own"
) -> list[Plan]:
    """Plan the episodes of an evaluation; tasks alternate.

    Scenes depend only on `seed`, the task's name and the episode's number. So two policies meet the same scenes, for
    any number of episodes and any other tasks. A benchmark's fixed initial states are played in order, independent of
    `seed`, and one task after another, because such a world is slow to change tasks.

    Args:
        tasks: the tasks to evaluate.
        episodes_per_task: number of episodes per task.
        seed: at least 0; another seed gives other scenes.
        instructions: `own`, or `shuffled`: each episode gets the instruction of another one, never its own task's.

    Raises:
        ValueError: for an unknown `instructions`, for `shuffled` if every shuffle gives some episode its own
            instruction, for more episodes than a task has initial states, or for a negative seed.
    """
    if instructions not in INSTRUCTIONS:
        raise RequestError(f"instructions={instructions!r} is not known; choose one of {', '.join(INSTRUCTIONS)}")
    if episodes_per_task < 1:
        raise RequestError(f"episodes_per_task must be at least 1, got {episodes_per_task}")
    if seed < 0:
        raise RequestError(f"seed must be at least 0, got {seed}")
    tasks = list(tasks)
    fixed = [task.initial_states for task in tasks if task.initial_states is not None]
    if fixed and episodes_per_task > min(fixed):
        raise RequestError(
            f"episodes_per_task={episodes_per_task}, but this benchmark fixed {min(fixed)} initial states of each task"
        )
    plans = [Plan(task, _scene_seed(seed, task, number)) for number in range(episodes_per_task) for task in tasks]
    if fixed:
        plans.sort(key=lambda plan: tasks.index(plan.task))
    if instructions == "own":
        return plans
    words = shuffle_instructions([plan.task.instruction for plan in plans], seed)
    return [Plan(plan.task, plan.seed, text) for plan, text in zip(plans, words, strict=True)]


def _scene_seed(seed: int, task: Task, number: int) -> int:
    if task.initial_states is not None:
        return number
    state = np.random.SeedSequence([seed, crc32(task.name.encode()), number]).generate_state(1, np.uint64)[0]
    return EVALUATION_SEEDS[int(state % len(EVALUATION_SEEDS))]


def shuffle_instructions(instructions: Sequence[str], seed: int = 0) -> list[str]:
    """Permute instructions so that every place gets a different one from before.

    Raises:
        ValueError: when more than half of them are equal, so that no such permutation exists.
    """
    rng = np.random.default_rng(seed)
    places: dict[str, list[int]] = {}
    for place in rng.permutation(len(instructions)):
        places.setdefault(instructions[place], []).append(int(place))
    largest = max(map(len, places.values()), default=0)
    if 2 * largest > len(instructions):
        most = max(places, key=lambda text: len(places[text]))
        raise RequestError(
            f"instructions=shuffled needs other instructions to give: {largest} of {len(instructions)} episodes are "
            f"{most!r}; evaluate at least two tasks with different instructions"
        )
    # Sort equal instructions into blocks and rotate by the largest block's size, so that nobody receives an instruction
    # equal to their own.
    grouped = [place for block in places.values() for place in block]
    shuffled = [""] * len(instructions)
    for position, place in enumerate(grouped):
        shuffled[place] = instructions[grouped[position - largest]]
    return shuffled
