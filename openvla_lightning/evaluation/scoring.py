"""One evaluation from end to end: a policy, a world, and a folder with the results."""

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from openvla_lightning.data.source.lerobot.recorder import Recorder
from openvla_lightning.env.base import EnvFactory, RequestError, Task, kind_of, refusing, world_of
from openvla_lightning.env.recorded import Offline
from openvla_lightning.env.workers import BuildError
from openvla_lightning.evaluation.control import Actor, Control
from openvla_lightning.evaluation.held_out import score_offline
from openvla_lightning.evaluation.plan import Plan, plan_episodes
from openvla_lightning.evaluation.rollout import loaded
from openvla_lightning.evaluation.session import Enough, SelfTestError, Session
from openvla_lightning.evaluation.stopping import Decided, shuffled
from openvla_lightning.report.results import Results
from openvla_lightning.report.shards import EvaluationShard, ShardError, merge
from openvla_lightning.report.tables import say
from openvla_lightning.report.versions import mismatches, versions
from openvla_lightning.report.writing import write_report
from openvla_lightning.runtime.files import reserve
from openvla_lightning.statistics import UnknownDatasetError

UNUSABLE = (FileNotFoundError, UnknownDatasetError, RequestError, BuildError, SelfTestError)
"""Errors of `evaluate` for requests that cannot be fulfilled; their message is enough. Any other error is a bug, and
keeps its traceback."""


def evaluate(
    policy: Actor | Callable[[], Actor],
    env: EnvFactory | Offline,
    output_dir: str | Path,
    *,
    tasks: str | Sequence[str] = "all",
    episodes_per_task: int | str = 10,
    interval_width: float = 0.2,
    seed: int = 0,
    instructions: str = "own",
    control: str = "blocking",
    rate_hz: float | None = None,
    latency: float | None = None,
    execute: int | None = None,
    ensemble: str | None = None,
    ensemble_horizon: int | None = None,
    self_test: bool = True,
    stop: str = "never",
    against: str | Path | None = None,
    margin: float | None = None,
    shard: str | None = None,
    record: str | Path | None = None,
    record_failures: bool = True,
    num_envs: int = 16,
    num_workers: int | None = None,
    save_videos: int = 1,
    label: str = "policy",
    task_set: str | None = None,
    config: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Results:
    """Evaluate `policy` and write results.json, report.md, a chart and videos into `output_dir`.

        policy = functools.partial(Policy.from_pretrained, "runs/train/.../step_003000.ckpt")
        evaluate(policy, functools.partial(Tabletop, image_size=96), "runs/evaluate/mine", episodes_per_task=5)

    If it is interrupted, or an environment fails, it still writes the finished episodes. A second call with the same
    folder, even after a kill, plays only the missing episodes.

    Args:
        policy: a `Policy`, or for rollouts any object with its `act`; or a callable that loads it, called after the
            world's check, because that fails faster.
        env: picklable callable that builds one environment (see `openvla_lightning.env.base`), or `Offline`.
        output_dir: created if absent.
        tasks: `all`, or names of tasks, families or task sets of the environment.
        episodes_per_task: rollouts of each task; or `auto`: 10 to 200, until its 95 % interval is narrow.
        interval_width: the interval's width at which `auto` stops, 0 to 1.
        seed: chooses the scenes; all policies with the same seed meet the same ones.
        instructions: `own`, or `shuffled` between episodes (see `plan_episodes`).
        control, rate_hz, latency, execute, ensemble, ensemble_horizon: see `control.Control`.
        self_test: first check that the world's actions and pictures are as they should be.
        stop: `decided` ends as soon as it is known whether this policy is better or worse than the one of `against`
            (see `stopping.Decided`); episodes are then played in a random order. `never`: all are played.
        against: results of another policy on the same scenes, for `stop=decided`.
        margin: a difference of success rates that does not matter, for `stop=decided`; None: every difference matters.
        shard: `k/n`: play only every n-th episode, beginning with the k-th, into `output_dir/shard_k_of_n`. The last
            shard to finish writes the results of the whole evaluation into `output_dir`; see `report.shards`.
        record: folder of a LeRobot dataset of the episodes, see `Recorder`; None: they are not recorded.
        record_failures: also record failed episodes, in a separate split.
        num_envs: environments at a time. Half of them make one batch for the policy.
        num_workers: processes that simulate; by default as many as CPU cores. Does not change results.
        save_videos: largest number of successes, and of failures, per task family that are saved as MP4.
        label: the policy's name in tables.
        task_set: name of the task set in tables; a selection of tasks is added to it.
        config: resolved config of the run, stored in results.json.

    Raises:
        ValueError: for unknown tasks, instructions that cannot be shuffled, or a folder that holds episodes of another
            evaluation, or in which another process evaluates.
        SelfTestError: when the world does not behave as it should.
        BuildError: when no environment can be built.
        WorkerError: when no episode runs without an error.
    """
    console = console or Console()
    fixed = kind_of(env) == "rollouts" and episodes_per_task != "auto" and stop == "never"
    part = _part(shard, fixed, control, latency)
    recorder = None if record is None else _recorder(record, record_failures, kind_of(env) != "rollouts", control)
    folder = Path(output_dir) if part is None else part.folder(output_dir)
    world = world_of(env)
    results = Results(
        label=label,
        env=world.__name__.lower(),
        task_set=_name_tasks(tasks, task_set),
        instructions=instructions,
        seed=seed,
        complete=False,
        versions=versions(),
        config=dict(config or {}),
        shard=None if part is None else str(part),
    )
    results.notes = mismatches(getattr(world, "reference_versions", {}), results.versions)
    results.notes += getattr(world, "version_notes", lambda versions: [])(results.versions)

    def load() -> Actor:
        actor = loaded(policy)
        results.checkpoint = dict(getattr(actor, "provenance", {}))
        return actor

    with refusing():
        reserved = reserve(folder, "evaluating")
    with reserved:
        started = time.monotonic()
        try:
            if kind_of(env) == "held_out":
                recorded: Any = env
                recorded.check()
                results.offline = score_offline(load(), recorded, console)
            else:
                enough = Enough(episodes_per_task, interval_width)
                decided = _stopping(stop, against, margin)
                session = Session(results, folder, enough, save_videos, console, decided, part, recorder)
                plans = functools.partial(_plan, tasks, enough, seed, instructions, decided is not None)
                if (known := announced(env, "tasks_of")) is not None:
                    plans(known)
                results.notes += announced(env, "notes_of") or []
                how = Control(control, rate_hz, latency, False, execute, ensemble, ensemble_horizon)
                build: Any = env
                session.run(load, build, plans, how, self_test, num_envs, num_workers)
            results.complete = True
        finally:
            results.timing["seconds"] = round(time.monotonic() - started, 1)
            if results.episodes or results.offline:
                report = write_report(results, folder, console)
                say(console, f"written to {report.parent}")
    whole = part is None or _merge(Path(output_dir), console)
    if recorder is not None and whole and (dataset := recorder.write()) is not None:
        say(console, f"recorded into {dataset}")
    return results


def _part(shard: str | None, fixed: bool, control: str, latency: float | None) -> EvaluationShard | None:
    if shard is None:
        return None
    with refusing():
        part = EvaluationShard.parse(shard)
    if not fixed:
        raise RequestError(
            "eval.shard splits rollouts whose number is fixed: give episodes_per_task=NUMBER and eval.stop=never"
        )
    if control == "realtime" and latency is None:
        raise RequestError("eval.shard: every part would measure a latency of its own; give eval.latency=SECONDS")
    return part


def _recorder(folder: str | Path, failures: bool, offline: bool, control: str) -> Recorder:
    if offline or control != "blocking":
        raise RequestError("eval.record keeps a picture with each action: it needs rollouts, and eval.control=blocking")
    with refusing():
        return Recorder(folder, failures)


def _merge(folder: Path, console: Console) -> bool:
    """Write the results of the whole evaluation if all shards have finished; return whether they have."""
    try:
        whole = merge(folder)
    except ShardError as error:
        say(console, f"not merged yet: {error}")
        return False
    write_report(whole, folder, console)
    say(console, f"all shards merged into {folder}")
    return True


def _name_tasks(tasks: str | Sequence[str], task_set: str | None) -> str:
    chosen = tasks if isinstance(tasks, str) else ", ".join(tasks)
    if task_set is None:
        return chosen
    return task_set if chosen == "all" else f"{task_set}: {chosen}"


def announced(env: Any, what: str) -> Any:
    """What the static method `what` of a world's class says of a world that is not built yet; None: it has none.

    Raises:
        RequestError: no world can be built with these arguments.
        BuildError: something that it needs is not installed.
    """
    world = world_of(env)
    if not hasattr(world, what):
        return None
    named = dict(zip(inspect.signature(world).parameters, getattr(env, "args", ()), strict=False))
    try:
        with refusing():
            return getattr(world, what)(**named, **getattr(env, "keywords", {}))
    except ImportError as error:
        raise BuildError(str(error)) from error


def _plan(
    tasks: str | Sequence[str],
    enough: Enough,
    seed: int,
    instructions: str,
    in_random_order: bool,
    known: Mapping[str, Task],
) -> list[Plan]:
    chosen = select_tasks(known, tasks)
    plans = plan_episodes(chosen, enough.most(chosen), seed, instructions)
    return shuffled(plans, seed) if in_random_order else plans


def _stopping(stop: str, against: str | Path | None, margin: float | None) -> Decided | None:
    if stop not in ("never", "decided"):
        raise RequestError(f"eval.stop={stop} is not known; choose never or decided")
    if (stop == "decided") != (against is not None):
        raise RequestError("eval.stop=decided compares with eval.against=FOLDER, results of another policy; give both")
    return None if against is None else Decided(against, margin)


def select_tasks(known: Mapping[str, Task], chosen: str | Sequence[str]) -> list[Task]:
    """Tasks by name, family or set, in the environment's order.

    Raises:
        ValueError: for an unknown name, or none; the message lists the known ones.
    """
    wanted = {chosen} if isinstance(chosen, str) else set(chosen)
    if wanted == {"all"}:
        return list(known.values())
    names = dict.fromkeys(name for task in known.values() for name in (*task.sets, task.family, task.name))
    if not wanted:
        raise RequestError(f"tasks=[] chooses no task; there are: all, {', '.join(names)}")
    if unknown := sorted(wanted - set(names)):
        close = get_close_matches(unknown[0], names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RequestError(
            f"no task, family or task set is called {unknown[0]!r}{hint}; there are: all, {', '.join(names)}"
        )
    return [task for task in known.values() if wanted & {*task.sets, task.family, task.name}]
