"""The runs of a sweep as tables: what each varied and cost, how well its policy does, over its seeds together."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from openvla_lightning.report.comparison import Comparison, Scene, compare_two, holm, scenes
from openvla_lightning.report.paper import reported
from openvla_lightning.report.results import Episode, Results, acting_rate, find_results, success_rate
from openvla_lightning.report.tables import Rows
from openvla_lightning.report.training_log import points, read_log
from openvla_lightning.runtime.files import below

FILE_NAME = "costs.json"
"""What `callbacks.Costs` leaves in the folder of a run."""
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
    results = {run: results_of(run) for run in runs}
    differences = _differences(results)
    columns: dict[str, list[str]] = {
        "run": list(names.values()),
        "success": [_success(found) for found in results.values()],
        "from the first": [differences.get(run, "-") for run in runs],
        PAPER: [reported(choices[run]) for run in runs],
        "held-out accuracy": [_last(run, "val/action_accuracy", lambda value: f"{value:.1%}") for run in runs],
        "L1": [_last(run, "val/l1", lambda value: f"{value:.3f}") for run in runs],
    }
    costs = [cost_cells(costs_of(run)) for run in runs]
    columns |= {name: [row[name] for row in costs] for name in costs[0]}
    columns["steps"] = [_mean(found, lambda episode: episode.length, "{:.0f}") for found in results.values()]
    columns["jerk"] = [_mean(found, lambda episode: episode.jerk, "{:.3f}") for found in results.values()]
    columns["actions"] = [_rate(found) for found in results.values()]
    columns["decision"] = [_latency(found) for found in results.values()]
    optional = ("from the first", PAPER, "L1", "steps", "jerk", "actions", "decision")
    shown = {name: cells for name, cells in columns.items() if name not in optional or set(cells) != {"-"}}
    return [list(shown), *(list(row) for row in zip(*shown.values(), strict=True))]


def over_seeds(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Each setting with its runs, one for each seed of the training; empty if all had one seed."""
    names = _names({run: [text for text in _overrides(run) if not text.startswith(SEED)] for run in runs})
    settings: dict[str, list[Path]] = {}
    for run in runs:
        settings.setdefault(names[run], []).append(run)
    several = len(set(map(_seed, runs))) > 1 and any(len(trained) > 1 for trained in settings.values())
    return settings if several else {}


def seed_rows(settings: Mapping[str, Sequence[Path]]) -> Rows:
    """Header and one row for each setting with rollouts, over the seeds that it was trained with; no rows without any.

    Differences are paired by training seed and scene. Their intervals come from drawing tasks and scenes anew; how much
    the seeds differ is told by the rates of the worst and the best one.

    Args:
        settings: of `over_seeds`.
    """
    rolled: dict[str, dict[Path, list[Results]]] = {}
    for name, trained in settings.items():
        if found := {run: results for run in trained if (results := results_of(run))}:
            rolled[name] = found
    if not rolled:
        return []
    met: dict[str, dict[Scene, bool]] = {
        name: {
            ((_seed(run), seed), task, episode): success
            for run, results in found.items()
            for (seed, task, episode), success in scenes(results).items()
        }
        for name, found in rolled.items()
    }
    differences = {one.second: _difference(one) for one in _from_first(met)}
    rows = [["setting", "seeds", "success", "worst, best", "from the first", "steps", "jerk", "actions", "step"]]
    for name, found in rolled.items():
        pooled = [result for results in found.values() for result in results]
        rates = [success_rate(e for result in results for e in result.episodes).rate for results in found.values()]
        spent = [costs["step_seconds"] for run in found if (costs := costs_of(run))["step_seconds"] is not None]
        rows.append(
            [
                name,
                str(len(found)),
                _success(pooled),
                f"{min(rates):.0%}, {max(rates):.0%}",
                differences.get(name, "-"),
                _mean(pooled, lambda episode: episode.length, "{:.0f}"),
                _mean(pooled, lambda episode: episode.jerk, "{:.3f}"),
                _rate(pooled),
                f"{1000 * sum(spent) / len(spent):,.0f} ms" if spent else "-",
            ]
        )
    return rows


def _seed(run: Path) -> str:
    return next((text for text in _overrides(run) if text.startswith(SEED)), "")


def _overrides(run: Path) -> list[str]:
    path = run / ".hydra" / "overrides.yaml"
    texts = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [str(text) for text in texts if not str(text).startswith(RUNS_OWN)]


def _names(choices: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """What each run varied, in words: of its choices those that not all runs share."""
    common = set.intersection(*(set(chosen) for chosen in choices.values())) if len(choices) > 1 else set()
    return {run: " ".join(text for text in chosen if text not in common) or run.name for run, chosen in choices.items()}


def costs_of(run: Path) -> dict[str, Any]:
    """What `callbacks.Costs` wrote into the folder of a run."""
    costs: dict[str, Any] = json.loads((run / FILE_NAME).read_text(encoding="utf-8"))
    return costs


def results_of(run: Path) -> list[Results]:
    """All rollouts below the folder of a run."""
    try:
        return [result for path in find_results([run]) if (result := Results.load(path)).episodes]
    except FileNotFoundError:
        return []


def _success(results: Sequence[Results]) -> str:
    return str(success_rate(e for result in results for e in result.episodes)) if results else "-"


def _differences(results: Mapping[Path, Sequence[Results]]) -> dict[Path, str]:
    """Points from the first run, with a star when more than chance, of runs that met its scenes."""
    return {
        Path(one.second): f"{100 * one.difference:+.0f}{_star(one)}"
        for one in _from_first({str(run): scenes(found) for run, found in results.items()})
    }


def _from_first(met: Mapping[str, Mapping[Scene, bool]]) -> list[Comparison]:
    """Comparisons of each with the first one, of those that met its scenes, p-values corrected for their number."""
    first, *others = met
    found = [compare_two(first, met[first], name, met[name]) for name in others]
    return holm([one for one in found if one.pairs])


def _star(one: Comparison) -> str:
    return " *" if one.significant else ""


def _difference(one: Comparison) -> str:
    low, high = one.interval
    return f"{100 * one.difference:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}){_star(one)}"


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
