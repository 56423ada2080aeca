"""A sweep on one page: what each run varied, what it cost, how well its policy does, curves over each other."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from openvla_lightning.report.chart import draw_chart
from openvla_lightning.report.comparison import Comparison, Scene, compare_two, holm, scenes
from openvla_lightning.report.page import RUN_PAGE, escape, write_page
from openvla_lightning.report.paper import reported
from openvla_lightning.report.results import Episode, Results, acting_rate, find_results, success_rate
from openvla_lightning.report.tables import Rows, fitting, markdown
from openvla_lightning.report.training_log import draw_curves, points, read_log
from openvla_lightning.runtime.files import below

FILE_NAME = "costs.json"
"""What `callbacks.Costs` leaves in the folder of a run."""
CURVES, RATES = "curves.png", "sweep_success.png"
"""Pictures of a sweep; `success.png` beside them is that of `compare`, over all evaluations that were named."""
PAPER = "in the paper (7B, Franka)"
"""Head of the column with the paper's Table 1: of another model and other tasks than a run on a laptop."""
RUNS_OWN = (
    "paths.",
    "hydra.",
    "run_name=",
    "+sweep=",
    "save_every=",
    "evaluate_after",
    "+evaluate_after",
    "ckpt_path=",
)
"""Overrides that say nothing about what a run is."""
SEED = "seed="
"""Override of the training's seed."""


def find_runs(folder: str | Path) -> list[Path]:
    """Folders of finished training runs at or below `folder`, in the order of their names (numbers as numbers)."""
    runs = [path.parent for path in below(folder, FILE_NAME)]
    return sorted(runs, key=lambda run: [(len(part), part) for part in run.parts])


def sweep_rows(runs: Sequence[Path]) -> Rows:
    """Header and one row per run: what it varied, how well it does, what it cost.

    Success is of all rollouts below the run's folder (`evaluate_after`, or `paths.output_dir=<run>/evaluation`). Its
    difference from the first run's is paired by initial state, and marked when it is more than chance; the paper's
    column is there when it reports on one of the runs.
    """
    choices = {run: _overrides(run) for run in runs}
    names = _names(choices)
    results = {run: _results(run) for run in runs}
    differences = _differences(results)
    columns: dict[str, list[str]] = {
        "run": list(names.values()),
        "success": [_success(found) for found in results.values()],
        "from the first": [differences.get(run, "-") for run in runs],
        PAPER: [reported(choices[run]) for run in runs],
        "held-out accuracy": [_last(run, "val/action_accuracy", lambda value: f"{value:.1%}") for run in runs],
        "L1": [_last(run, "val/l1", lambda value: f"{value:.3f}") for run in runs],
    }
    costs = [cost_cells(_costs(run)) for run in runs]
    columns |= {name: [row[name] for row in costs] for name in costs[0]}
    columns["steps"] = [_mean(found, lambda episode: episode.length, "{:.0f}") for found in results.values()]
    columns["jerk"] = [_mean(found, lambda episode: episode.jerk, "{:.3f}") for found in results.values()]
    columns["actions"] = [_rate(found) for found in results.values()]
    columns["decision"] = [_latency(found) for found in results.values()]
    optional = ("from the first", PAPER, "L1", "steps", "jerk", "actions", "decision")
    shown = {name: cells for name, cells in columns.items() if name not in optional or set(cells) != {"-"}}
    return [list(shown), *(list(row) for row in zip(*shown.values(), strict=True))]


def seed_rows(runs: Sequence[Path]) -> Rows:
    """Header and one row for each setting over all seeds that it was trained with; no rows if all had one seed.

    Differences are paired by training seed and scene. Their intervals come from drawing tasks and scenes anew; how much
    the seeds differ is told by the rates of the worst and the best one.
    """
    seeds = {run: next((text for text in _overrides(run) if text.startswith(SEED)), "") for run in runs}
    names = _names({run: [text for text in _overrides(run) if not text.startswith(SEED)] for run in runs})
    settings: dict[str, list[Path]] = {}
    for run in runs:
        if _results(run):
            settings.setdefault(names[run], []).append(run)
    if len(set(seeds.values())) < 2 or all(len(trained) < 2 for trained in settings.values()):
        return []
    met: dict[str, dict[Scene, bool]] = {
        name: {
            ((seeds[run], seed), task, episode): success
            for run in trained
            for (seed, task, episode), success in scenes(_results(run)).items()
        }
        for name, trained in settings.items()
    }
    (first, *others) = met
    found = holm([compare_two(first, met[first], name, met[name]) for name in others])
    differences = {one.second: _difference(one) for one in found if one.pairs}
    rows = [["setting", "seeds", "success", "worst, best", "from the first", "steps", "jerk", "actions", "step"]]
    for name, trained in settings.items():
        results = [result for run in trained for result in _results(run)]
        rates = [success_rate(e for result in _results(run) for e in result.episodes).rate for run in trained]
        spent = [costs["step_seconds"] for run in trained if (costs := _costs(run))["step_seconds"] is not None]
        rows.append(
            [
                name,
                str(len(trained)),
                _success(results),
                f"{min(rates):.0%}, {max(rates):.0%}",
                differences.get(name, "-"),
                _mean(results, lambda episode: episode.length, "{:.0f}"),
                _mean(results, lambda episode: episode.jerk, "{:.3f}"),
                _rate(results),
                f"{1000 * sum(spent) / len(spent):,.0f} ms" if spent else "-",
            ]
        )
    return rows


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
    memory = {_costs(run)["memory_of"] for run in runs}
    for grid in fitting(rows, "Runs", (console := console or Console()).width):
        console.print(grid)
    linked = [rows[0], *([_linked(row[0], run, folder), *row[1:]] for row, run in zip(rows[1:], runs, strict=True))]
    lines = ["# Runs", "", markdown(linked), ""]
    if over_seeds := seed_rows(runs):
        for grid in fitting(over_seeds, "Over seeds", console.width):
            console.print(grid)
        lines += ["## Over seeds", "", markdown([[escape(cell) for cell in row] for row in over_seeds]), ""]
        lines += [
            "Differences are paired by training seed and scene, with 95 % intervals.",
            "",
        ]
    named = dict(zip(_labels(folder, runs, rows), runs, strict=True))
    if draw_rates(named, folder / RATES):
        lines += [f"![Success rates]({RATES})", ""]
    if draw_sweep(named, folder / CURVES):
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


def draw_sweep(named: Mapping[str, Path], picture: Path) -> bool:
    """Draw the learning curves of the runs, by their names, over each other; False when none was logged."""
    metrics = {
        "train/loss": "training loss",
        "val/action_accuracy": "held-out action-token accuracy",
        "val/l1": "held-out L1",
    }
    logs = {name: read_log(run) for name, run in named.items()}
    panels = {title: {name: points(log, metric) for name, log in logs.items()} for metric, title in metrics.items()}
    return draw_curves(panels, picture, marked=[metrics["val/action_accuracy"], metrics["val/l1"]])


def draw_rates(named: Mapping[str, Path], picture: Path) -> bool:
    """Draw the success rates of the runs, by their names, on each set of tasks; False when none was rolled out."""
    bars: dict[str, dict[str, list[Episode]]] = {}
    for name, run in named.items():
        for result in _results(run):
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


def _overrides(run: Path) -> list[str]:
    path = run / ".hydra" / "overrides.yaml"
    texts = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [str(text) for text in texts if not str(text).startswith(RUNS_OWN)]


def _names(choices: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """What each run varied, in words: of its choices those that not all runs share."""
    common = set.intersection(*(set(chosen) for chosen in choices.values())) if len(choices) > 1 else set()
    return {run: " ".join(text for text in chosen if text not in common) or run.name for run, chosen in choices.items()}


def _costs(run: Path) -> dict[str, Any]:
    costs: dict[str, Any] = json.loads((run / FILE_NAME).read_text(encoding="utf-8"))
    return costs


def _results(run: Path) -> list[Results]:
    try:
        return [result for path in find_results([run]) if (result := Results.load(path)).episodes]
    except FileNotFoundError:
        return []


def _success(results: Sequence[Results]) -> str:
    return str(success_rate(e for result in results for e in result.episodes)) if results else "-"


def _differences(results: Mapping[Path, Sequence[Results]]) -> dict[Path, str]:
    """Points from the first run, with a star when more than chance, of runs that met its scenes."""
    (first, *others) = results
    base = scenes(results[first])
    found = [compare_two(str(first), base, str(run), scenes(results[run])) for run in others]
    return {
        Path(one.second): f"{100 * one.difference:+.0f}{' *' if one.significant else ''}"
        for one in holm([one for one in found if one.pairs])
    }


def _difference(one: Comparison) -> str:
    low, high = one.interval
    return f"{100 * one.difference:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}){' *' if one.significant else ''}"


def _rate(results: Sequence[Results]) -> str:
    rate = acting_rate(results)
    return f"{rate:,.0f} / s" if rate else "-"


def _latency(results: Sequence[Results]) -> str:
    seconds = [result.timing["seconds_per_call"] for result in results if "seconds_per_call" in result.timing]
    return f"{1000 * sum(seconds) / len(seconds):,.0f} ms" if seconds else "-"


def _mean(results: Sequence[Results], of: Callable[[Episode], float | None], form: str) -> str:
    """Mean over all episodes without an error for which there is a value."""
    found = [of(e) for result in results for e in result.episodes if e.error is None]
    values = [value for value in found if value is not None]
    return form.format(sum(values) / len(values)) if values else "-"


def _last(run: Path, metric: str, show: Callable[[float], str]) -> str:
    found = points(read_log(run), metric)
    return show(found[-1][1]) if found else "-"


def cost_cells(costs: dict[str, Any]) -> dict[str, str]:
    """What `callbacks.Costs` wrote, for people."""
    size, seconds = costs["checkpoint_bytes"], costs["step_seconds"]
    return {
        "trainable": _count(costs["trainable"]),
        "of all": f"{costs['trainable'] / costs['parameters']:.1%}",
        "checkpoint": "-" if size is None else f"{size / 1e6:,.1f} MB",
        "peak memory": f"{costs['peak_memory_bytes'] / 1e9:.2f} GB",
        "step": "-" if seconds is None else f"{1000 * seconds:,.0f} ms",
    }


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 10_000_000 else f"{number:,}"
