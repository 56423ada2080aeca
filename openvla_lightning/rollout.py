"""Rolling a policy out: which episodes, with which words, many at a time.

The same arguments give the same episodes bit for bit, whatever the number of worker processes: a batch's members, and
with them the rounding of the policy's arithmetic, depend on `num_envs` and the plan alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np

from openvla_lightning.env.base import EVALUATION_SEEDS, EnvFactory, Task
from openvla_lightning.env.workers import Command, EnvWorkers, Outcome, Start
from openvla_lightning.results import Episode

INSTRUCTIONS = ("own", "shuffled")
NUM_GROUPS = 2
"""Slots are in two groups: one is simulated while the policy looks at the other."""


class Actor(Protocol):
    """Whatever chooses actions; `openvla_lightning.Policy` does."""

    def act(self, image: Sequence[np.ndarray], instruction: Sequence[str]) -> np.ndarray:
        """Images uint8 [H, W, 3] and as many instructions -> actions [B, D] in the environment's units."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One episode to roll out. `instruction` None: the words the environment gives."""

    task: Task
    seed: int
    instruction: str | None = None


def plan_episodes(
    tasks: Iterable[Task], episodes_per_task: int, seed: int = 0, instructions: str = "own"
) -> list[Plan]:
    """Lay out the episodes of an evaluation, tasks taking turns.

    Scenes depend on `seed`, the task's name and the episode's number alone, so that two policies meet the same scenes,
    however many episodes and whichever other tasks are evaluated.

    Args:
        tasks: to evaluate.
        episodes_per_task: of each.
        seed: at least 0; another seed gives other scenes.
        instructions: `own`, or `shuffled`: each episode gets the words of another one, never its own task's.

    Raises:
        ValueError: for an unknown `instructions`, or `shuffled` where no shuffle avoids every own instruction.
    """
    if instructions not in INSTRUCTIONS:
        raise ValueError(f"instructions={instructions!r} is not known; choose one of {', '.join(INSTRUCTIONS)}")
    if episodes_per_task < 1:
        raise ValueError(f"episodes_per_task must be at least 1, got {episodes_per_task}")
    tasks = list(tasks)
    plans = [Plan(task, _scene_seed(seed, task, number)) for number in range(episodes_per_task) for task in tasks]
    if instructions == "own":
        return plans
    words = shuffle_instructions([plan.task.instruction for plan in plans], seed)
    return [Plan(plan.task, plan.seed, text) for plan, text in zip(plans, words, strict=True)]


def _scene_seed(seed: int, task: Task, number: int) -> int:
    state = np.random.SeedSequence([seed, crc32(task.name.encode()), number]).generate_state(1, np.uint64)[0]
    return EVALUATION_SEEDS[int(state % len(EVALUATION_SEEDS))]


def shuffle_instructions(instructions: Sequence[str], seed: int = 0) -> list[str]:
    """Permute instructions so that none stays where an equal one was.

    Raises:
        ValueError: when one instruction makes up more than half of them, so that no such permutation exists.
    """
    rng = np.random.default_rng(seed)
    places: dict[str, list[int]] = {}
    for place in rng.permutation(len(instructions)):
        places.setdefault(instructions[place], []).append(int(place))
    largest = max(map(len, places.values()), default=0)
    if 2 * largest > len(instructions):
        most = max(places, key=lambda text: len(places[text]))
        raise ValueError(
            f"instructions=shuffled needs other instructions to give: {largest} of {len(instructions)} episodes are "
            f"{most!r}; evaluate at least two tasks with different instructions"
        )
    # Equal instructions side by side, all moved on by the size of the largest block: no block meets itself.
    grouped = [place for block in places.values() for place in block]
    shuffled = [""] * len(instructions)
    for position, place in enumerate(grouped):
        shuffled[place] = instructions[grouped[position - largest]]
    return shuffled


@dataclass(slots=True)
class _Running:
    number: int
    plan: Plan
    instruction: str = ""
    image: np.ndarray | None = None
    length: int = 0
    frames: list[np.ndarray] | None = None


OnEpisode = Callable[[int, Episode, list[np.ndarray] | None], None]
"""Called as each episode ends with its number in the plan, the episode, and its images if they were kept."""


def rollout(
    policy: Actor | Callable[[], Actor],
    make_env: EnvFactory,
    plans: Callable[[Mapping[str, Task]], Sequence[Plan]],
    num_envs: int = 16,
    num_workers: int = 2,
    on_episode: OnEpisode | None = None,
    keep_frames: Callable[[Plan], bool] = lambda plan: False,
) -> list[Episode]:
    """Roll out every planned episode; return them in the order of the plan.

    A slot whose episode ends starts the next one at once, so that no environment waits for the slowest.

    Args:
        policy: acts on the images of all ready environments of one group; or a callable that loads it, called once the
            environments are up and the plan is known to be good.
        make_env: picklable; called in the worker processes.
        plans: from the environment's tasks by name to the episodes, in the order in which they start.
        num_envs: environments in all; half of them share a batch.
        num_workers: processes that simulate.
        on_episode: told of each episode as it ends (then not in the order of the plan).
        keep_frames: asked when an episode starts whether its images are to be kept for `on_episode`.

    Raises:
        WorkerError: when an environment fails, with its traceback.
        ValueError: when the policy's answer has the wrong shape.
    """
    if num_envs < 1 or num_workers < 1:
        raise ValueError(f"num_envs and num_workers must be at least 1, got {num_envs} and {num_workers}")
    episodes: dict[int, Episode] = {}
    running: dict[int, _Running] = {}

    with EnvWorkers(make_env, num_envs, num_workers) as workers:
        waiting = deque(enumerate(plans(workers.tasks)))
        actor = loaded(policy)

        def start(slot: int) -> Start | None:
            if not waiting:
                running.pop(slot, None)
                return None
            number, plan = waiting.popleft()
            running[slot] = _Running(number, plan, frames=[] if keep_frames(plan) else None)
            return Start(plan.task.name, plan.seed)

        def settle(outcomes: Mapping[int, Outcome]) -> dict[int, Command]:
            """Take in what the slots answered; return what they are to do next."""
            commands: dict[int, Command] = {}
            ready = []
            for slot, outcome in outcomes.items():
                episode = running[slot]
                if episode.image is None:  # the answer to a Start
                    episode.instruction = episode.plan.instruction or outcome.instruction
                else:
                    episode.length += 1
                episode.image = outcome.image
                if episode.frames is not None:
                    episode.frames.append(outcome.image)
                if not outcome.done and episode.length < workers.max_episode_steps:
                    ready.append(slot)
                    continue
                finished = episodes[episode.number] = Episode(
                    episode.plan.task.name,
                    episode.plan.task.family,
                    episode.plan.seed,
                    episode.instruction,
                    outcome.success,
                    episode.length,
                )
                if on_episode:
                    on_episode(episode.number, finished, episode.frames)
                if command := start(slot):
                    commands[slot] = command
            if ready:
                images = [running[slot].image for slot in ready]
                commands |= zip(ready, _act(actor, images, [running[s].instruction for s in ready]), strict=True)
            return commands

        groups: deque[dict[int, Command]] = deque()
        for group in range(NUM_GROUPS):
            # Slot numbers alternate between workers within each group.
            slots = range(group * num_envs // NUM_GROUPS, (group + 1) * num_envs // NUM_GROUPS)
            commands: dict[int, Command] = {slot: command for slot in slots if (command := start(slot))}
            workers.send(commands)
            groups.append(commands)
        while groups:
            if commands := groups.popleft():
                commands = settle(workers.receive(commands))
                workers.send(commands)
                groups.append(commands)
    return [episodes[number] for number in sorted(episodes)]


def loaded(policy: Actor | Callable[[], Actor]) -> Actor:
    """The policy itself, or what the callable loads."""
    return policy if hasattr(policy, "act") and not isinstance(policy, type) else policy()


def _act(policy: Actor, images: list, instructions: list[str]) -> np.ndarray:
    actions = np.asarray(policy.act(images, instructions), dtype=np.float64)
    if actions.ndim != 2 or len(actions) != len(images):
        raise ValueError(f"the policy was asked for {len(images)} actions [B, D] and gave shape {list(actions.shape)}")
    return actions
