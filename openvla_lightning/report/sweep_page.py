"""A sweep on one page: its tables, success rates, and learning curves over each other."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from openvla_lightning.report.chart import draw_chart
from openvla_lightning.report.page import RUN_PAGE, escape, write_page
from openvla_lightning.report.results import Episode, success_rate
from openvla_lightning.report.sweeps import costs_of, over_seeds, results_of, seed_rows, sweep_rows
from openvla_lightning.report.tables import Rows, fitting, markdown
from openvla_lightning.report.training_log import Points, draw_curves, points, read_log

CURVES, RATES = "curves.png", "sweep_success.png"
"""Pictures of a sweep; `success.png` beside them is that of `compare`, over all evaluations that were named."""


def write_sweep(folder: Path, runs: Sequence[Path], console: Console | None = None) -> Path:
    """Print the table of the runs below `folder`; write it with pictures as `sweep.md` and `sweep.html`.

    Args:
        folder: folder of the sweep, in which the pages are written.
        runs: its runs, at least one; see `find_runs`.
        console: where the table is printed.

    Returns:
        Path of sweep.md.
    """
    rows = sweep_rows(runs)
    memory = {costs_of(run)["memory_of"] for run in runs}
    for grid in fitting(rows, "Runs", (console := console or Console()).width):
        console.print(grid)
    linked = [rows[0], *([_linked(row[0], run, folder), *row[1:]] for row, run in zip(rows[1:], runs, strict=True))]
    lines = ["# Runs", "", markdown(linked), ""]
    named = dict(zip(_labels(folder, runs, rows), runs, strict=True))
    settings = over_seeds(runs)
    if pooled := seed_rows(settings):
        for grid in fitting(pooled, "Over seeds", console.width):
            console.print(grid)
        lines += ["## Over seeds", "", markdown([[escape(cell) for cell in row] for row in pooled]), ""]
        lines += ["Differences are paired by training seed and scene, with 95 % intervals. Curves are means.", ""]
    drawn = settings or {name: [run] for name, run in named.items()}
    if draw_rates(drawn, folder / RATES):
        lines += [f"![Success rates]({RATES})", ""]
    if draw_sweep(drawn, folder / CURVES):
        lines += [f"![Learning curves]({CURVES})", ""]
    lines += [
        "Success with its Wilson 95 % interval; its difference from the first run paired by initial state, * when more "
        "than chance (McNemar, Holm, 5 %). Accuracy of action tokens and L1 (normalised units) at the last validation. "
        "Peak memory of the " + " or the ".join(sorted(memory)) + "; the median optimiser step; steps of an episode; "
        "jerk as the mean second difference of actions in the world's units; actions a second, and the time of a "
        "decision, of the batches of the evaluation.",
        "",
        *(f"- {escape(name)}: `{run}`" for name, run in named.items()),
    ]
    return write_page(lines, folder / "sweep.md")


def draw_sweep(settings: Mapping[str, Sequence[Path]], picture: Path) -> bool:
    """Draw the learning curves of settings, by their names, over each other; False when none was logged.

    The curve of a setting with several runs is their mean, at the steps that all of them logged.
    """
    metrics = {
        "train/loss": "training loss",
        "val/action_accuracy": "held-out action-token accuracy",
        "val/l1": "held-out L1",
    }
    logs = {name: [read_log(run) for run in trained] for name, trained in settings.items()}
    panels = {
        title: {name: _mean([points(log, metric) for log in some]) for name, some in logs.items()}
        for metric, title in metrics.items()
    }
    return draw_curves(panels, picture, marked=[metrics["val/action_accuracy"], metrics["val/l1"]])


def _mean(curves: Sequence[Points]) -> Points:
    values = [dict(curve) for curve in curves]
    shared = set.intersection(*(set(one) for one in values))
    return [(step, statistics.fmean(one[step] for one in values)) for step in sorted(shared)]


def draw_rates(settings: Mapping[str, Sequence[Path]], picture: Path) -> bool:
    """Draw the success rates of settings, by their names, on each set of tasks; False when none was rolled out."""
    bars: dict[str, dict[str, list[Episode]]] = {}
    for name, trained in settings.items():
        for result in (result for run in trained for result in results_of(run)):
            bars.setdefault(f"{result.task_set} tasks", {}).setdefault(name, []).extend(result.episodes)
    if not bars:
        return False
    rates = {group: {name: success_rate(played) for name, played in found.items()} for group, found in bars.items()}
    draw_chart(rates, picture, "Success rate")
    return True


def _labels(folder: Path, runs: Sequence[Path], rows: Rows) -> list[str]:
    """What each run varied, and where it lies when others varied the same."""
    names = [row[0] for row in rows[1:]]
    places = [run.relative_to(folder).as_posix() for run in runs]
    return [f"{name} ({place})" if names.count(name) > 1 else name for name, place in zip(names, places, strict=True)]


def _linked(name: str, run: Path, folder: Path) -> str:
    """A run's name, leading to its own page where there is one."""
    page = (run / RUN_PAGE).with_suffix(".html")
    return f"[{escape(name)}](<{page.relative_to(folder).as_posix()}>)" if page.is_file() else escape(name)
