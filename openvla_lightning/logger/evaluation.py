"""Logs an evaluation's results with the loggers of training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from openvla_lightning.logger.wandb import WandbLogger
from openvla_lightning.report.results import Results


def log_results(logger: Logger, results: Results, folder: str | Path) -> None:
    """Log an evaluation under `eval/`, at the step of its checkpoint, and end the logger's run.

    W&B also gets a table of tasks and a table of episodes with their videos, in the group of the checkpoint's training.

    Args:
        logger: a logger that was not used before.
        results: results of rollouts or held-out steps.
        folder: folder of the evaluation; `Episode.video` is relative to it.
    """
    run, step = origin(Path(str(results.checkpoint.get("path", ""))))
    if isinstance(logger, WandbLogger):
        logger.about(run, name=f"{results.row}, {results.task_set} tasks")
    logger.log_hyperparams(results.config)
    logger.log_metrics(dict(metrics(results)), step)
    if isinstance(logger, WandbLogger) and results.episodes:
        _log_tables(logger, results, Path(folder), step)
    logger.save()
    logger.finalize("success")


def origin(checkpoint: Path) -> tuple[Path, int]:
    """The folder of a checkpoint's run, and the step; for a run's folder, the step of its newest checkpoint."""
    near = (checkpoint, *checkpoint.parents[:2])
    run = next((folder for folder in near if (folder / ".hydra").is_dir()), checkpoint)
    saved = run.glob("checkpoints/step_*.ckpt") if run == checkpoint else ()
    newest = max(saved, key=lambda path: path.stat().st_mtime_ns, default=checkpoint)
    number = newest.stem.removeprefix("step_")
    return run, int(number) if number.isdecimal() else 0


def metrics(results: Results) -> Iterator[tuple[str, float]]:
    """Names under `eval/` and their values: success with its interval, overall and by family, or token accuracy."""
    if results.offline:
        of_datasets = {f"/{name}": scores for name, scores in results.offline["datasets"].items()}
        for suffix, scores in {"": results.offline, **of_datasets}.items():
            yield from ((f"eval/{name}{suffix}", scores[name]) for name in ("token_accuracy", "l1") if name in scores)
    if results.episodes:
        rate = results.overall
        yield from zip(("eval/success_low", "eval/success_high"), rate.interval, strict=True)
        yield "eval/episodes", rate.episodes
    if results.episodes and rate.episodes:
        yield "eval/success", rate.rate
        yield "eval/progress", rate.progress
        yield from ((f"eval/success/{name}", of.rate) for name, of in results.families.items() if of.episodes)


def _log_tables(logger: WandbLogger, results: Results, folder: Path, step: int) -> None:
    import wandb

    tasks = [[n, r.successes, r.episodes, r.rate, *r.interval, r.mean_length] for n, r in results.tasks.items()]
    header = ["task", "successes", "episodes", "rate", "low", "high", "steps"]
    logger.log_table("eval/tasks", columns=header, data=tasks, step=step)
    rows: list[list[Any]] = [
        [e.task, e.instruction, e.success, e.length, wandb.Video(str(folder / e.video), format="mp4")]
        for e in results.episodes
        if e.video
    ]
    if rows:
        header = ["task", "instruction", "success", "steps", "video"]
        logger.log_table("eval/videos", columns=header, data=rows, step=step)
