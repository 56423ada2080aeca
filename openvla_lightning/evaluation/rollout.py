"""Rolling a policy out, many episodes at a time.

The same arguments give the same episodes bit for bit, for any number of worker processes: the members of a batch, and
so the rounding of the policy's arithmetic, depend only on `num_envs` and the plan.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from openvla_lightning.env.base import Check, EnvFactory, RequestError, Task, refusing
from openvla_lightning.env.commands import Command, Move, Outcome, Start
from openvla_lightning.env.workers import EnvWorkers, WorkerError
from openvla_lightning.evaluation.control import Actor, Control, ask, observed
from openvla_lightning.evaluation.ensemble import Memory
from openvla_lightning.evaluation.plan import Plan
from openvla_lightning.evaluation.played import Played, jerk
from openvla_lightning.evaluation.timing import Stopwatch
from openvla_lightning.report.results import Episode
from openvla_lightning.types import Observation

NUM_GROUPS = 2
"""Number of groups of slots: one is simulated while the policy computes actions for the other."""


ATTEMPTS = 2
"""How often an episode is started before its error counts."""
HOPELESS = 3
"""An evaluation ends after this many errors or deaths of processes if no episode ran without an error."""


@dataclass(slots=True)
class _Running:
    """An episode that is being played.

    Attributes:
        past: observations before `seen`, the newest first.
        moves: moves to make before the policy is asked again.
        memory: the ensemble's memory for this episode.
        executed: its actions [D] so far.
        shown: its observation at each step, if these are kept.
        pending: in real time, the actions [T, D] that have not arrived yet.
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
"""Called when an episode ends, with its number in the plan, the episode, and its observations if they were kept."""


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

    A slot starts its next episode as soon as one ends, so that no environment waits for the slowest. An episode
    whose environment raises is started once more; then it is recorded as an error. If a process dies, any of its
    episodes may be the cause, so each is started once more at the end, alone in its process.

    Args:
        policy: acts for all ready environments of one group; or a callable that loads it, called after the
            environments are built and the plan is checked.
        make_env: picklable; called in the worker processes.
        plans: maps the environment's tasks by name to the episodes, in the order in which they start.
        num_envs: number of environments; half of them share a batch.
        num_workers: processes that simulate.
        on_episode: called when an episode ends (not in the order of the plan).
        keep: called when an episode starts; returns whether to keep its observations for `on_episode`.
        wanted: called before an episode starts; returns whether it is still needed.
        control: whether the world waits for the policy, and how much of a chunk is executed; default: it waits, and
            all is executed.
        on_ready: called with the completed `control`, before the first episode.
        on_self_test: called with the results of the environment's self-test and the name of the renderer, before the
            policy is loaded; None: no test.
        stopwatch: measures the times.

    Raises:
        WorkerError: when an environment cannot be built, or no episode runs without an error.
        ValueError: the policy's answer has the wrong shape, or the world lacks an input of the policy.
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
    """Runs episodes in the slots of `workers`: starts them, asks the policy, moves them, ends them; see `rollout`."""

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
        self.suspects: deque[_Running] = deque()
        self.running: dict[int, _Running] = {}
        self.episodes: dict[int, Episode] = {}

    def play(self, num_slots: int) -> list[Episode]:
        """Play all episodes; one group of slots is simulated while the policy computes actions for the other."""
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
        """Start the next episode in a slot; None if there is none."""
        self.running.pop(slot, None)
        if (episode := self.next_episode(slot)) is None:
            return None
        episode.shown = [] if self.keep(episode.plan) else None
        self.running[slot] = episode
        return Start(episode.plan.task.name, episode.plan.seed)

    def next_episode(self, slot: int) -> _Running | None:
        """The episode to start in a slot; None if there is none for it."""
        if self.retries:
            return self.retries.popleft()
        while self.waiting and not self.wanted(self.waiting[0][1]):
            self.waiting.popleft()
        if self.waiting:
            return _Running(*self.waiting.popleft())
        return self.suspects.popleft() if self.suspects and self.workers.alone(slot, self.running) else None

    def settle(self, outcomes: Mapping[int, Outcome]) -> dict[int, Command]:
        """Process the slots' answers; return their next commands."""
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
        """The next move of an episode; within a chunk, pictures are rendered only if they are kept or for `history`."""
        move = episode.moves.popleft()
        if move.action is not None:
            episode.executed.append(move.action)
        unseen = episode.moves and episode.shown is None and not self.earlier
        return replace(move, look=False) if unseen else move

    def goes_on(self, episode: _Running, outcome: Outcome) -> bool:
        """Process one answer; return whether its episode continues."""
        if outcome.error and episode.attempt < ATTEMPTS:
            if outcome.died and self.workers.deaths >= HOPELESS:
                check_hope(self.episodes.values(), outcome.error)
            again = self.suspects if outcome.died else self.retries
            again.append(_Running(episode.number, episode.plan, episode.attempt + 1))
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
        """The policy's observation of an episode."""
        assert episode.seen is not None
        return observed(episode.seen, episode.instruction, episode.past)

    def moves(self, episode: _Running, actions: np.ndarray) -> deque[Move]:
        """The moves after the policy chose the actions [T, D].

        In real time, these actions arrive `control.delay` steps later. Until then, the robot executes the actions of
        the previous decision, and then holds its position.
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
        """Record an episode."""
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
        if len(self.episodes) >= HOPELESS:
            check_hope(self.episodes.values(), outcome.error)


def check_hope(episodes: Iterable[Episode], error: str | None) -> None:
    """Raise WorkerError, with the last `error`, if no episode ran without one."""
    if all(played.error for played in episodes):
        raise WorkerError(f"no episode ran without an error; the last one:\n{error}")


def loaded(policy: Actor | Callable[[], Actor]) -> Actor:
    """The policy, loaded if it is a callable.

    Raises:
        RequestError: when loading refuses the checkpoint or an option.
    """
    if hasattr(policy, "act") and not isinstance(policy, type):
        return policy
    with refusing():
        return policy()
