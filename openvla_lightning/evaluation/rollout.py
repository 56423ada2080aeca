"""Rolling a policy out, many episodes at a time.

The same arguments give the same episodes bit for bit, whatever the number of worker processes: a batch's members, and
with them the rounding of the policy's arithmetic, depend on `num_envs` and the plan alone.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from openvla_lightning.env.base import Check, EnvFactory, RequestError, Task, refusing
from openvla_lightning.env.commands import Command, Move, Outcome, Start
from openvla_lightning.env.workers import EnvWorkers, WorkerError
from openvla_lightning.evaluation.control import Actor, Control, ask, observed
from openvla_lightning.evaluation.ensemble import Memory
from openvla_lightning.evaluation.plan import Plan
from openvla_lightning.evaluation.played import Played
from openvla_lightning.evaluation.timing import Stopwatch
from openvla_lightning.report.results import Episode
from openvla_lightning.types import Observation

NUM_GROUPS = 2
"""Slots are in two groups: one is simulated while the policy looks at the other."""


ATTEMPTS = 2
"""How often an episode is begun before its error counts."""
HOPELESS = 3
"""So many errors, and not one episode without, end an evaluation."""


@dataclass(slots=True)
class _Running:
    """An episode that is being played.

    Attributes:
        past: what was seen before `seen`, the newest first.
        moves: what it is to do before the policy is asked again.
        memory: what an ensemble remembers of it.
        executed: its actions [D] so far.
        shown: what it was shown at each step, where that is kept.
        pending: in real time, the actions [T, D] that the policy is still thinking about.
    """

    number: int
    plan: Plan
    attempt: int = 1
    instruction: str = ""
    seen: Mapping[str, np.ndarray] | None = None
    past: deque[Mapping[str, np.ndarray]] = field(default_factory=deque)
    moves: deque[Move] = field(default_factory=deque)
    memory: Memory = ()
    executed: list[np.ndarray] = field(default_factory=list)
    pending: np.ndarray | None = None
    length: int = 0
    shown: list[Mapping[str, np.ndarray]] | None = None


OnEpisode = Callable[[int, Episode, Played | None], None]
"""Called as each episode ends with its number in the plan, the episode, and what it was shown if that was kept."""


def rollout(
    policy: Actor | Callable[[], Actor],
    make_env: EnvFactory,
    plans: Callable[[Mapping[str, Task]], Sequence[Plan]],
    num_envs: int = 16,
    num_workers: int = 2,
    on_episode: OnEpisode | None = None,
    keep: Callable[[Plan], bool] = lambda plan: False,
    wanted: Callable[[Plan], bool] = lambda plan: True,
    control: Control | None = None,
    on_ready: Callable[[Control], None] = lambda control: None,
    on_self_test: Callable[[list[Check], str | None], None] | None = None,
    stopwatch: Stopwatch | None = None,
) -> list[Episode]:
    """Roll out every planned episode; return them in the order of the plan.

    A slot whose episode ends starts the next one at once, so that no environment waits for the slowest. An episode
    whose environment raises, or dies, is begun once more; then it is recorded as an error.

    Args:
        policy: acts on what all ready environments of one group show; or a callable that loads it, called once the
            environments are up and the plan is known to be good.
        make_env: picklable; called in the worker processes.
        plans: from the environment's tasks by name to the episodes, in the order in which they start.
        num_envs: environments in all; half of them share a batch.
        num_workers: processes that simulate.
        on_episode: told of each episode as it ends (then not in the order of the plan).
        keep: asked when an episode starts whether what it is shown is to be kept for `on_episode`.
        wanted: asked before an episode starts whether it is still needed.
        control: whether the world waits for the policy, and how much of a chunk is executed; default: it does, all.
        on_ready: told of `control` when what it left open is known, before the first episode.
        on_self_test: told what the environment's self-test found and what drew its pictures, before the policy is
            loaded; None: there is no test.
        stopwatch: measures where the time goes.

    Raises:
        WorkerError: when an environment cannot be built, or no episode runs without an error.
        ValueError: when the policy's answer has the wrong shape, or lacks what the world shows.
    """
    if num_envs < 1 or num_workers < 1:
        raise RequestError(f"num_envs and num_workers must be at least 1, got {num_envs} and {num_workers}")
    with EnvWorkers(make_env, num_envs, num_workers) as workers:
        waiting = plans(workers.tasks)
        if on_self_test:
            on_self_test(*workers.self_test())
        actor = loaded(policy)
        control = (control or Control()).settle(actor, workers.control_hz)
        on_ready(control)
        stopwatch = stopwatch or Stopwatch()
        with stopwatch.running(min(num_workers, num_envs)):
            return Rollout(actor, workers, waiting, control, wanted, keep, on_episode, stopwatch).play(num_envs)


class Rollout:
    """Episodes in the slots of `workers`: starts them, asks the policy, moves them, ends them; see `rollout`."""

    def __init__(
        self,
        actor: Actor,
        workers: EnvWorkers,
        plans: Sequence[Plan],
        control: Control,
        wanted: Callable[[Plan], bool],
        keep: Callable[[Plan], bool],
        on_episode: OnEpisode | None,
        stopwatch: Stopwatch,
    ) -> None:
        self.actor, self.workers, self.control = actor, workers, control
        self.smoother, self.stopwatch = control.smoother, stopwatch
        self.wanted, self.keep, self.on_episode = wanted, keep, on_episode
        self.earlier: int = getattr(actor, "history", 1) - 1
        self.waiting = deque(enumerate(plans))
        self.retries: deque[_Running] = deque()
        self.running: dict[int, _Running] = {}
        self.episodes: dict[int, Episode] = {}

    def play(self, num_slots: int) -> list[Episode]:
        """Play everything; one group of slots is simulated while the policy looks at the other."""
        groups: deque[dict[int, Command]] = deque()
        for group in range(NUM_GROUPS):
            # Slot numbers alternate between workers within each group.
            slots = range(group * num_slots // NUM_GROUPS, (group + 1) * num_slots // NUM_GROUPS)
            commands: dict[int, Command] = {slot: command for slot in slots if (command := self.start(slot))}
            self.workers.send(commands)
            groups.append(commands)
        while groups:
            if commands := groups.popleft():
                with self.stopwatch.idling():
                    outcomes = self.workers.receive(commands)
                self.stopwatch.simulator += sum(outcome.seconds for outcome in outcomes.values())
                commands = self.settle(outcomes)
                self.workers.send(commands)
                groups.append(commands)
        return [self.episodes[number] for number in sorted(self.episodes)]

    def start(self, slot: int) -> Start | None:
        """Begin the next episode in a slot; None when there is none."""
        if self.retries:
            episode = self.retries.popleft()
        else:
            while self.waiting and not self.wanted(self.waiting[0][1]):
                self.waiting.popleft()
            if not self.waiting:
                self.running.pop(slot, None)
                return None
            episode = _Running(*self.waiting.popleft())
        episode.shown = [] if self.keep(episode.plan) else None
        self.running[slot] = episode
        return Start(episode.plan.task.name, episode.plan.seed)

    def settle(self, outcomes: Mapping[int, Outcome]) -> dict[int, Command]:
        """Take in what the slots answered; return what they are to do next."""
        commands: dict[int, Command] = {}
        ready = []
        for slot, outcome in outcomes.items():
            episode = self.running[slot]
            if not self.goes_on(episode, outcome):
                if command := self.start(slot):
                    commands[slot] = command
            elif episode.moves:
                commands[slot] = self.next_move(episode)
            else:
                ready.append(slot)
        if ready:
            with self.stopwatch.acting():
                chunks = ask(self.actor, [self.observation(self.running[slot]) for slot in ready])
            for slot, chunk in zip(ready, chunks, strict=True):
                episode = self.running[slot]
                actions = self.control.chosen(chunk)
                if self.smoother is not None:
                    episode.memory, action = self.smoother.step(episode.memory, chunk)
                    actions = action[None]
                self.stopwatch.actions += len(actions)
                episode.moves = self.moves(episode, actions)
                commands[slot] = self.next_move(episode)
        return commands

    def next_move(self, episode: _Running) -> Move:
        """What an episode does now; nobody looks within a chunk, unless pictures are kept or remembered."""
        move = episode.moves.popleft()
        if move.action is not None:
            episode.executed.append(move.action)
        unseen = episode.moves and episode.shown is None and not self.earlier
        return replace(move, look=False) if unseen else move

    def goes_on(self, episode: _Running, outcome: Outcome) -> bool:
        """Take in one answer; whether its episode is not over."""
        if outcome.error and episode.attempt < ATTEMPTS:
            self.retries.append(_Running(episode.number, episode.plan, episode.attempt + 1))
            return False
        if not outcome.error:
            assert outcome.seen is not None
            if episode.seen is None:  # the answer to a Start
                episode.instruction = episode.plan.instruction or outcome.instruction
                episode.past = deque([outcome.seen] * self.earlier, maxlen=self.earlier)
            else:
                episode.past.appendleft(episode.seen)
            episode.length += outcome.steps
            episode.seen = outcome.seen
            if episode.shown is not None:
                episode.shown.append(outcome.seen)
            if not outcome.done and episode.length < self.workers.max_episode_steps:
                return True
        self.end(episode, outcome)
        return False

    def observation(self, episode: _Running) -> Observation:
        """What the policy is shown and told of an episode."""
        assert episode.seen is not None
        return observed(episode.seen, episode.instruction, episode.past)

    def moves(self, episode: _Running, actions: np.ndarray) -> deque[Move]:
        """What becomes of the actions [T, D] that the policy chose just now.

        In real time they come `control.delay` steps later. Until then the robot executes the actions of the decision
        before, and then stays where it was told to go.
        """
        if not self.control.delay:
            return deque(Move(action) for action in actions)
        before, episode.pending = episode.pending, actions
        left = self.workers.max_episode_steps - episode.length
        if before is None:
            return deque([Move(None, min(self.control.delay, left) - 1)])
        waits = max(0, min(self.control.delay, left) - len(before))
        return deque([*(Move(action) for action in before[:-1]), Move(before[-1], waits)])

    def end(self, episode: _Running, outcome: Outcome) -> None:
        """Record an episode.

        Raises:
            WorkerError: when none ran without an error so far.
        """
        task = episode.plan.task
        finished = self.episodes[episode.number] = Episode(
            task.name,
            task.family,
            episode.plan.seed,
            episode.instruction or episode.plan.instruction or task.instruction,
            outcome.success,
            episode.length,
            progress=1.0 if outcome.success else outcome.progress,
            error=outcome.error,
            jerk=None if outcome.error else jerk(episode.executed),
        )
        if self.on_episode:
            kept = None if outcome.error or episode.shown is None else episode.shown
            rate = self.workers.control_hz
            self.on_episode(episode.number, finished, None if kept is None else Played(kept, episode.executed, rate))
        if len(self.episodes) >= HOPELESS and all(played.error for played in self.episodes.values()):
            raise WorkerError(f"no episode ran without an error; the last one:\n{outcome.error}")


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
    """The policy itself, or what the callable loads.

    Raises:
        RequestError: when loading refuses the checkpoint or an option.
    """
    if hasattr(policy, "act") and not isinstance(policy, type):
        return policy
    with refusing():
        return policy()
