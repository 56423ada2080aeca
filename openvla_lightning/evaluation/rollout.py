"""Rolling a policy out: which episodes, with which words, many at a time.

The same arguments give the same episodes bit for bit, whatever the number of worker processes: a batch's members, and
with them the rounding of the policy's arithmetic, depend on `num_envs` and the plan alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from openvla_lightning.env.base import EVALUATION_SEEDS, Check, EnvFactory, Task
from openvla_lightning.env.workers import Command, EnvWorkers, Move, Outcome, Start, WorkerError
from openvla_lightning.evaluation.control import Actor, Control
from openvla_lightning.report.results import Episode

INSTRUCTIONS = ("own", "shuffled")
NUM_GROUPS = 2
"""Slots are in two groups: one is simulated while the policy looks at the other."""


ATTEMPTS = 2
"""How often an episode is begun before its error counts."""
HOPELESS = 3
"""So many errors, and not one episode without, end an evaluation."""


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
    however many episodes and whichever other tasks are evaluated. A benchmark's fixed initial states are played in
    their order, whatever `seed`, and one task after another: such a world is slow to change tasks.

    Args:
        tasks: to evaluate.
        episodes_per_task: of each.
        seed: at least 0; another seed gives other scenes.
        instructions: `own`, or `shuffled`: each episode gets the words of another one, never its own task's.

    Raises:
        ValueError: for an unknown `instructions`, `shuffled` where no shuffle avoids every own instruction, or more
            episodes than a task has initial states.
    """
    if instructions not in INSTRUCTIONS:
        raise ValueError(f"instructions={instructions!r} is not known; choose one of {', '.join(INSTRUCTIONS)}")
    if episodes_per_task < 1:
        raise ValueError(f"episodes_per_task must be at least 1, got {episodes_per_task}")
    tasks = list(tasks)
    fixed = [task.initial_states for task in tasks if task.initial_states is not None]
    if fixed and episodes_per_task > min(fixed):
        raise ValueError(
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
    attempt: int = 1
    instruction: str = ""
    image: np.ndarray | None = None
    pending: np.ndarray | None = None
    length: int = 0
    frames: list[np.ndarray] | None = None
    actions: list[np.ndarray] = field(default_factory=list)


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
    wanted: Callable[[Plan], bool] = lambda plan: True,
    control: Control | None = None,
    on_ready: Callable[[Control], None] = lambda control: None,
    on_self_test: Callable[[list[Check], str | None], None] | None = None,
) -> list[Episode]:
    """Roll out every planned episode; return them in the order of the plan.

    A slot whose episode ends starts the next one at once, so that no environment waits for the slowest. An episode
    whose environment raises, or dies, is begun once more; then it is recorded as an error.

    Args:
        policy: acts on the images of all ready environments of one group; or a callable that loads it, called once the
            environments are up and the plan is known to be good.
        make_env: picklable; called in the worker processes.
        plans: from the environment's tasks by name to the episodes, in the order in which they start.
        num_envs: environments in all; half of them share a batch.
        num_workers: processes that simulate.
        on_episode: told of each episode as it ends (then not in the order of the plan).
        keep_frames: asked when an episode starts whether its images are to be kept for `on_episode`.
        wanted: asked before an episode starts whether it is still needed.
        control: whether the world waits for the policy; default it does.
        on_ready: told of `control` when what it left open is known, before the first episode.
        on_self_test: told what the environment's self-test found and what drew its pictures, before the policy is
            loaded; None: there is no test.

    Raises:
        WorkerError: when an environment cannot be built, or no episode runs without an error.
        ValueError: when the policy's answer has the wrong shape.
    """
    if num_envs < 1 or num_workers < 1:
        raise ValueError(f"num_envs and num_workers must be at least 1, got {num_envs} and {num_workers}")
    episodes: dict[int, Episode] = {}
    running: dict[int, _Running] = {}
    retries: deque[_Running] = deque()

    with EnvWorkers(make_env, num_envs, num_workers) as workers:
        waiting = deque(enumerate(plans(workers.tasks)))
        if on_self_test:
            on_self_test(*workers.self_test())
        actor = loaded(policy)
        control = (control or Control()).settle(actor, workers.control_hz)
        on_ready(control)

        def start(slot: int) -> Start | None:
            if retries:
                episode = retries.popleft()
            else:
                while waiting and not wanted(waiting[0][1]):
                    waiting.popleft()
                if not waiting:
                    running.pop(slot, None)
                    return None
                episode = _Running(*waiting.popleft())
            episode.frames = [] if keep_frames(episode.plan) else None
            running[slot] = episode
            return Start(episode.plan.task.name, episode.plan.seed)

        def end(episode: _Running, outcome: Outcome) -> None:
            task = episode.plan.task
            words = episode.instruction or episode.plan.instruction or task.instruction
            finished = episodes[episode.number] = Episode(
                task.name,
                task.family,
                episode.plan.seed,
                words,
                outcome.success,
                episode.length,
                progress=1.0 if outcome.success else outcome.progress,
                error=outcome.error,
                jerk=None if outcome.error else jerk(episode.actions),
            )
            if on_episode:
                on_episode(episode.number, finished, None if outcome.error else episode.frames)
            if len(episodes) >= HOPELESS and all(played.error for played in episodes.values()):
                raise WorkerError(f"no episode ran without an error; the last one:\n{outcome.error}")

        def move(episode: _Running, action: np.ndarray) -> Move:
            episode.actions.append(action)
            if not control.delay:
                return Move(action)
            pending, episode.pending = episode.pending, action
            return Move(pending, min(control.delay, workers.max_episode_steps - episode.length) - 1)

        def settle(outcomes: Mapping[int, Outcome]) -> dict[int, Command]:
            """Take in what the slots answered; return what they are to do next."""
            commands: dict[int, Command] = {}
            ready = []
            for slot, outcome in outcomes.items():
                episode = running[slot]
                if outcome.error and episode.attempt < ATTEMPTS:
                    retries.append(_Running(episode.number, episode.plan, episode.attempt + 1))
                elif outcome.error:
                    end(episode, outcome)
                else:
                    if episode.image is None:  # the answer to a Start
                        episode.instruction = episode.plan.instruction or outcome.instruction
                    episode.length += outcome.steps
                    episode.image = outcome.image
                    if episode.frames is not None and outcome.image is not None:
                        episode.frames.append(outcome.image)
                    if not outcome.done and episode.length < workers.max_episode_steps:
                        ready.append(slot)
                        continue
                    end(episode, outcome)
                if command := start(slot):
                    commands[slot] = command
            if ready:
                actions = _act(actor, [running[s].image for s in ready], [running[s].instruction for s in ready])
                commands |= {slot: move(running[slot], action) for slot, action in zip(ready, actions, strict=True)}
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


def jerk(actions: Sequence[np.ndarray]) -> float | None:
    """How much motion jerks: the mean size of the second difference of actions [D], their last number left out.

    Actions are changes of place and rotation, so their second difference is the third one of the pose. It compares
    policies in one world, in its units. The last number is the gripper's. None for fewer than three actions.
    """
    if len(actions) < 3:
        return None
    changes = np.diff(np.stack(actions)[:, :-1], n=2, axis=0)
    return float(np.linalg.norm(changes, axis=1).mean())


def loaded(policy: Actor | Callable[[], Actor]) -> Actor:
    """The policy itself, or what the callable loads."""
    return policy if hasattr(policy, "act") and not isinstance(policy, type) else policy()


def _act(policy: Actor, images: list, instructions: list[str]) -> np.ndarray:
    actions = np.asarray(policy.act(images, instructions), dtype=np.float64)
    if actions.ndim != 2 or len(actions) != len(images):
        raise ValueError(f"the policy was asked for {len(images)} actions [B, D] and gave shape {list(actions.shape)}")
    return actions
