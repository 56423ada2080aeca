"""Rollouts whose episodes, videos and facts about the world are written to disk when each episode ends."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from openvla_lightning.data.source.lerobot.recorder import Recorder
from openvla_lightning.env.base import Check, EnvFactory, RequestError, Task
from openvla_lightning.evaluation.control import Actor, Control
from openvla_lightning.evaluation.journal import Journal
from openvla_lightning.evaluation.plan import Plan
from openvla_lightning.evaluation.played import Played, taken
from openvla_lightning.evaluation.rollout import check_hope, rollout
from openvla_lightning.evaluation.stopping import Decided
from openvla_lightning.evaluation.timing import Stopwatch
from openvla_lightning.evaluation.video import write_video
from openvla_lightning.report.results import Episode, Results, success_rate
from openvla_lightning.report.shards import EvaluationShard
from openvla_lightning.report.tables import say
from openvla_lightning.runtime.cores import available_cores
from openvla_lightning.runtime.progress import Bar

AUTO_FEWEST, AUTO_MOST = 10, 200
"""Smallest and largest number of episodes per task with `episodes_per_task=auto`."""


class SelfTestError(RuntimeError):
    """The world does not behave as it should, so scores in it would be meaningless."""


@dataclass(frozen=True, slots=True)
class Enough:
    """Decides when a task has been played often enough."""

    episodes_per_task: int | str
    interval_width: float

    def __post_init__(self) -> None:
        if isinstance(self.episodes_per_task, str) and self.episodes_per_task != "auto":
            raise RequestError(f"episodes_per_task={self.episodes_per_task!r}: give a number, or auto")
        if not 0 < self.interval_width <= 1:
            raise RequestError(f"interval_width={self.interval_width} must lie in (0, 1]; 0.2 is 10 points either way")

    @property
    def auto(self) -> bool:
        return self.episodes_per_task == "auto"

    def most(self, tasks: Sequence[Task]) -> int:
        limits = [task.initial_states for task in tasks if task.initial_states is not None]
        return min([AUTO_MOST, *limits]) if self.auto else int(self.episodes_per_task)

    def reached(self, episodes: Sequence[Episode]) -> bool:
        """Whether the interval of one task's episodes is narrow enough."""
        low, high = success_rate(episodes).interval
        return self.auto and len(episodes) >= AUTO_FEWEST and high - low <= self.interval_width


class Session:
    """Updates `results`, the journal, the videos and the progress bar when episodes end."""

    def __init__(
        self,
        results: Results,
        folder: Path,
        enough: Enough,
        save_videos: int,
        console: Console,
        decided: Decided | None = None,
        shard: EvaluationShard | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._results, self._folder, self._enough, self._save_videos = results, folder, enough, save_videos
        self._decided = decided
        self._finished: dict[int, Episode] = {}
        self._kept: Counter[tuple[str, bool]] = Counter()
        self._console = console
        self._plans: list[Plan] = []
        self._shard, self._recorder, self._played = shard, recorder, 0

    def run(
        self,
        load: Callable[[], Actor],
        make_env: EnvFactory,
        plans: Callable[[Mapping[str, Task]], list[Plan]],
        control: Control,
        self_test: bool,
        num_envs: int,
        num_workers: int | None,
    ) -> None:
        """Roll out the missing episodes; raises as `rollout` does."""

        def planned(known: Mapping[str, Task]) -> list[Plan]:
            self._plans = plans(known)
            if self._decided is not None:
                self._decided.check(self._plans)
            own = sum(map(self._in_shard, range(len(self._plans))))
            if not own:
                which = "the evaluation" if self._shard is None else f"eval.shard={self._shard}"
                raise RequestError(
                    f"{which} has nothing to play, of {len(self._plans)} episodes: choose tasks that the world has, "
                    "and at most as many parts as there are episodes"
                )
            self._bar.restart(self._results.row, None if self._enough.auto else own)
            self._others = {(p.task.name, p.seed) for n, p in enumerate(self._plans) if not self._in_shard(n)}
            return self._plans

        def ready() -> Actor:
            policy = load()
            self._bar.restart(self._bar.label, self._bar.total)  # loading a model does not count as episodes' time
            return policy

        starting = f"starting {num_envs} environments"
        self._bar = Bar(starting, None, "episodes", console=self._console)
        if not self._bar.drawn:
            self._bar.say(starting)  # a log hears nothing else until the first episode ends
        with self._bar, _torch_threads(max(1, available_cores() // 2)), self._timed() as stopwatch:
            rollout(
                ready,
                make_env,
                planned,
                num_envs,
                num_workers or available_cores(),
                on_episode=self._take,
                keep=self._keep,
                wanted=self._wanted,
                control=control,
                on_ready=self._begin,
                on_self_test=self._check if self_test else None,
                stopwatch=stopwatch,
            )
        if episodes := self._results.episodes:
            check_hope(episodes, episodes[-1].error)
        if self._decided is not None:
            verdict = self._decided.verdict(self._plans, self._finished)
            against = self._decided.other.label
            self._results.verdict = {"against": against, "planned": len(self._plans), **asdict(verdict)}
            self._results.verdict["interval"] = list(verdict.interval)
            say(self._console, f"{against} and {self._results.label}: {verdict}")

    def _in_shard(self, number: int) -> bool:
        return self._shard is None or self._shard.takes(number)

    @contextmanager
    def _timed(self) -> Iterator[Stopwatch]:
        """A stopwatch whose times are written into the results, also after an error."""
        stopwatch = Stopwatch()
        try:
            yield stopwatch
        finally:
            self._results.timing |= stopwatch.summary(self._played)

    def _check(self, checks: list[Check], renderer: str | None) -> None:
        self._results.self_test = [asdict(check) for check in checks]
        if renderer:
            self._results.versions["renderer"] = renderer
        for note in self._results.notes:
            say(self._console, f"note: {note}")
        if wrong := [f"{check.name}: {check.seen}" for check in checks if not check.ok]:
            raise SelfTestError(
                f"this world is not as it should be ({'; '.join(wrong)}), and scores in it would mean little; "
                "eval.self_test=false scores all the same"
            )

    def _begin(self, control: Control) -> None:
        """Add the episodes of earlier calls in the folder."""
        results = self._results
        results.control = control.to_dict()
        same = {"env": results.env, "instructions": results.instructions, "versions": results.versions}
        world = results.config.get("env", {})
        measured = {"latency": None, "delay": None} if control.measured else {}
        identity = {**same, "checkpoint": results.checkpoint.get("sha256"), "world": world}
        key = results.checkpoint.get("unnorm_key")
        self._journal = Journal(self._folder, {**identity, "unnorm_key": key, "control": results.control | measured})
        for number, plan in enumerate(self._plans):
            if self._in_shard(number) and (episode := self._journal.find(plan.task.name, plan.seed, plan.instruction)):
                self._count(number, episode)
        self._bar.restart(self._bar.label, self._bar.total, self._bar.done)  # those took no time in this call

    def _wanted(self, plan: Plan) -> bool:
        if self._decided is not None and self._decided.reached(self._plans, self._finished):
            return False
        if (plan.task.name, plan.seed) in self._others:
            return False
        played = [e for e in self._finished.values() if e.task == plan.task.name]
        if any((e.seed, plan.instruction or e.instruction) == (plan.seed, e.instruction) for e in played):
            return False
        return not self._enough.reached(played)

    def _keep(self, plan: Plan) -> bool:
        films = any(self._kept[plan.task.family, success] < self._save_videos for success in (True, False))
        return films or self._recorder is not None

    def _take(self, number: int, episode: Episode, played: Played | None) -> None:
        outcome = episode.family, episode.success
        if played and self._kept[outcome] < self._save_videos:
            name = f"videos/{episode.task}_{'success' if episode.success else 'failure'}_{number:04d}.mp4"
            frames = [shown["image"] for shown in played.shown]
            write_video(self._folder / name, frames, episode.instruction, episode.success)
            episode = replace(episode, video=name)
        if played and self._recorder is not None:
            self._recorder.add(f"{episode.task}_{episode.seed}", taken(episode, played))
        self._journal.add(episode)
        self._played += 1
        self._count(number, episode)

    def _count(self, number: int, episode: Episode) -> None:
        self._kept[episode.family, episode.success] += episode.video is not None
        self._finished[number] = episode
        self._results.episodes = [self._finished[index] for index in sorted(self._finished)]
        rate = success_rate(self._finished.values())
        news = f"{100 * rate.rate:.0f} % success" + f"  {rate.errors} errors" * bool(rate.errors)
        self._bar.advance(news=news)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    # Torch's threads spin while they wait, and would take cores from the simulation.
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
