"""One evaluation from end to end: a policy, a world, and a folder with the results."""

import functools
import importlib.metadata
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openvla_lightning.actions import dimension_names
from openvla_lightning.env.base import EnvFactory, Task
from openvla_lightning.env.offline import Offline
from openvla_lightning.policy import Policy
from openvla_lightning.report import write_report
from openvla_lightning.results import Episode, Results, success_rate
from openvla_lightning.rollout import Actor, Plan, loaded, plan_episodes, rollout
from openvla_lightning.video import write_video

PACKAGES = ("openvla-lightning", "torch", "transformers", "timm", "mujoco", "gymnasium", "numpy")


def evaluate(
    policy: Actor | Callable[[], Actor],
    env: EnvFactory | Offline,
    output_dir: str | Path,
    *,
    tasks: str | Sequence[str] = "all",
    episodes_per_task: int = 10,
    seed: int = 0,
    instructions: str = "own",
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

    Interrupted, or stopped by a failing environment, it still writes the episodes that had finished.

    Args:
        policy: a `Policy`, or for rollouts anything with its `act`; or a callable that loads it, called after the world
            was seen to work, for that is the quicker of the two to fail.
        env: picklable callable that builds one environment (see `openvla_lightning.env.base`), or `Offline`.
        output_dir: made if absent.
        tasks: `all`, or names of tasks, families or task sets of the environment.
        episodes_per_task: rollouts of each task.
        seed: chooses the scenes; the same seed shows every policy the same ones.
        instructions: `own`, or `shuffled` between episodes (see `plan_episodes`).
        num_envs: environments at a time. Half of them make one batch for the policy.
        num_workers: processes that simulate; as many as CPU cores by default. Does not change results.
        save_videos: at most so many successes and so many failures of each task family are kept as MP4.
        label: the policy's name in tables.
        task_set: the tasks' name in tables, when all are played; otherwise what `tasks` says comes with it.
        config: resolved config of the run, kept in results.json.

    Raises:
        ValueError: for unknown tasks, or instructions that cannot be shuffled.
        WorkerError: when an environment fails.
    """
    console = console or Console()
    results = Results(
        label=label,
        env=getattr(env, "func", env if isinstance(env, type) else type(env)).__name__.lower(),
        task_set=_name_tasks(tasks, task_set),
        instructions=instructions,
        seed=seed,
        complete=False,
        versions=versions(),
        config=dict(config or {}),
    )

    def load() -> Actor:
        actor = loaded(policy)
        results.checkpoint = dict(getattr(actor, "provenance", {}))
        return actor

    started = time.monotonic()
    try:
        if isinstance(env, Offline):
            env.check()
            results.offline = score_offline(load(), env, console)
        else:
            plans = functools.partial(_plan, tasks, episodes_per_task, seed, instructions)
            workers = num_workers or available_cores()
            _roll_out(load, env, plans, results, Path(output_dir), num_envs, workers, save_videos, console)
        results.complete = True
    finally:
        results.wall_seconds = round(time.monotonic() - started, 1)
        if results.episodes or results.offline:
            report = write_report(results, output_dir, console)
            console.print(f"written to {report.parent}")
    return results


def _name_tasks(tasks: str | Sequence[str], task_set: str | None) -> str:
    chosen = tasks if isinstance(tasks, str) else ", ".join(tasks)
    if task_set is None:
        return chosen
    return task_set if chosen == "all" else f"{task_set}: {chosen}"


def _plan(
    tasks: str | Sequence[str], episodes_per_task: int, seed: int, instructions: str, known: Mapping[str, Task]
) -> list[Plan]:
    return plan_episodes(select_tasks(known, tasks), episodes_per_task, seed, instructions)


def select_tasks(known: Mapping[str, Task], chosen: str | Sequence[str]) -> list[Task]:
    """Tasks by name, family or set, in the environment's order.

    Raises:
        ValueError: for a name that is none of these, with the ones there are.
    """
    wanted = {chosen} if isinstance(chosen, str) else set(chosen)
    if wanted == {"all"}:
        return list(known.values())
    names = dict.fromkeys(name for task in known.values() for name in (*task.sets, task.family, task.name))
    if unknown := sorted(wanted - set(names)):
        close = get_close_matches(unknown[0], names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"no task, family or task set is called {unknown[0]!r}{hint}; there are: all, {', '.join(names)}"
        )
    return [task for task in known.values() if wanted & {*task.sets, task.family, task.name}]


def _roll_out(
    load: Callable[[], Actor],
    make_env: EnvFactory,
    plans: Any,
    results: Results,
    folder: Path,
    num_envs: int,
    num_workers: int,
    save_videos: int,
    console: Console,
) -> None:
    finished: dict[int, Episode] = {}
    kept: Counter[tuple[str, bool]] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[news]}"), console=console)

    def planned(known: Mapping[str, Task]) -> list[Plan]:
        episodes = plans(known)
        progress.update(bar, total=len(episodes), description=results.row)
        return episodes

    def ready() -> Actor:
        policy = load()
        progress.reset(bar)  # loading a model says nothing about the speed of episodes
        return policy

    def keep_frames(plan: Plan) -> bool:
        return any(kept[plan.task.family, success] < save_videos for success in (True, False))

    def on_episode(number: int, episode: Episode, frames: list[np.ndarray] | None) -> None:
        kind = episode.family, episode.success
        if frames and kept[kind] < save_videos:
            kept[kind] += 1
            name = f"videos/{episode.task}_{'success' if episode.success else 'failure'}_{number:04d}.mp4"
            write_video(folder / name, frames, episode.instruction, episode.success)
            episode = replace(episode, video=name)
        finished[number] = episode
        results.episodes = [finished[index] for index in sorted(finished)]
        speed = len(finished) / (progress.tasks[bar].elapsed or 1.0)
        news = f"{speed:.1f} episodes/s  {100 * success_rate(finished.values()).rate:.0f} % success"
        progress.update(bar, advance=1, news=news)

    with progress, _torch_threads(max(1, available_cores() // 2)):
        bar = progress.add_task(f"starting {num_envs} environments", total=None, news="")
        rollout(ready, make_env, planned, num_envs, num_workers, on_episode, keep_frames)


def score_offline(policy: Actor, env: Offline, console: Console | None = None) -> dict[str, Any]:
    """Token accuracy and L1 per action dimension on held-out steps.

    `token_accuracy` and `l1` are as in training: each token predicted from the true ones before it, in normalised
    units. `l1_executed` compares what the policy would do, decoded on its own, in the dataset's units.

    Raises:
        TypeError: for anything but a `Policy`.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"env=offline looks into the model, so it needs a Policy, not {type(policy).__name__}")
    head, camera = policy.processor.action_head, policy.processor.camera
    batches, statistics = env.open(policy.processor.transform.image_size, policy.normalisation)
    scores: dict[str, list[np.ndarray]] = {"token_accuracy": [], "l1": [], "l1_executed": []}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        bar = progress.add_task("predicting held-out steps", total=env.num_steps)
        for steps in batches:
            batch = policy.processor.collate(steps).to(policy.device)
            with torch.inference_mode():
                output = policy.vla(
                    pixel_values=batch.pixel_values.to(policy.dtype),
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                )
                correct, error = head.score(output, batch)
            dim = batch.actions.shape[-1]
            scores["token_accuracy"].append(correct.float().cpu().numpy().reshape(-1, dim))
            scores["l1"].append(error.float().cpu().numpy().reshape(-1, dim))
            done = statistics.unnormalise(batch.actions[:, 0].double().cpu().numpy(), method=policy.normalisation)
            told = policy.act([step.images[camera] for step in steps], [step.instruction for step in steps])
            scores["l1_executed"].append(np.abs(told - done))
            dataset = steps[0].dataset_name
            progress.update(bar, advance=len(steps))
        progress.update(bar, total=progress.tasks[bar].completed)
    if not scores["l1"]:
        raise ValueError("there are no held-out steps to predict: the dataset has no `val` split, or an empty one")
    means = {name: np.concatenate(values).mean(axis=0) for name, values in scores.items()}
    names = dimension_names(len(means["l1"]))
    return {
        "dataset": dataset,
        "steps": int(sum(map(len, scores["l1_executed"]))),
        "token_accuracy": float(means["token_accuracy"].mean()),
        "l1": float(means["l1"].mean()),
        "dimensions": {
            name: {metric: float(values[index]) for metric, values in means.items()} for index, name in enumerate(names)
        },
    }


def versions() -> dict[str, str]:
    """Versions that move results: MuJoCo's contact solver as much as torch's kernels."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"renderer": os.environ.get("MUJOCO_GL", "automatic")}


def available_cores() -> int:
    """Cores this process may use, which in a container or a job is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    # Torch's threads spin while they wait, and would take the cores from the simulation.
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
