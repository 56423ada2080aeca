"""A sweep as one table: what each run varied, what it cost, how well its policy does."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from openvla_lightning.page import write_page
from openvla_lightning.report.results import Results, find_results, success_rate
from openvla_lightning.tables import Rows, markdown, table

FILE_NAME = "costs.json"
"""What `callbacks.Costs` leaves in the folder of a run."""
RUNS_OWN = ("paths.", "hydra.", "run_name=", "+sweep=", "save_every=", "evaluate_after", "+evaluate_after")
"""Overrides that say nothing about what a run is."""


def find_runs(folder: str | Path) -> list[Path]:
    """Folders of finished training runs at or below `folder`, in the order of their names (numbers as numbers)."""
    runs = [path.parent for path in Path(folder).rglob(FILE_NAME)]
    return sorted(runs, key=lambda run: [(len(part), part) for part in run.parts])


def sweep_rows(runs: Sequence[Path]) -> Rows:
    """Header and one row per run: what it varied, success, token accuracy, parameters, memory, seconds per step.

    Success is of all rollouts below the run's folder (`evaluate_after`, or `paths.output_dir=<run>/evaluation`).
    """
    choices = {run: _overrides(run) for run in runs}
    common = set.intersection(*(set(chosen) for chosen in choices.values())) if len(runs) > 1 else set()
    rows = [["run", "success", "held-out accuracy", "trainable", "of all", "checkpoint", "peak memory", "step"]]
    for run in runs:
        costs = json.loads((run / FILE_NAME).read_text())
        name = " ".join(text for text in choices[run] if text not in common) or run.name
        rows.append([name, _success(run), _accuracy(run), *_cost_cells(costs)])
    return rows


def write_sweep(folder: str | Path, console: Console | None = None) -> Path | None:
    """Print the table of the runs below `folder` and write it as `sweep.md`; None when there are no runs."""
    runs = find_runs(folder)
    if not runs:
        return None
    rows = sweep_rows(runs)
    memory = {json.loads((run / FILE_NAME).read_text())["memory_of"] for run in runs}
    notes = [
        "Success with its Wilson 95 % interval; peak memory of the " + " or the ".join(sorted(memory)) + "; the median "
        "optimiser step. Accuracy of action tokens at the last validation.",
        "",
        *(f"- {row[0]}: `{run}`" for row, run in zip(rows[1:], runs, strict=True)),
    ]
    (console or Console()).print(table(rows, "Runs"))
    return write_page(["# Runs", "", markdown(rows), "", *notes, ""], Path(folder) / "sweep.md")


def _overrides(run: Path) -> list[str]:
    path = run / ".hydra" / "overrides.yaml"
    texts = yaml.safe_load(path.read_text()) if path.is_file() else []
    return [str(text) for text in texts if not str(text).startswith(RUNS_OWN)]


def _success(run: Path) -> str:
    try:
        results = [Results.load(path) for path in find_results([run])]
    except FileNotFoundError:
        return "-"
    return str(success_rate(episode for result in results for episode in result.episodes))


def _accuracy(run: Path) -> str:
    log = run / "metrics.csv"
    if not log.is_file():
        return "-"
    with log.open(newline="") as file:
        values = [value for row in csv.DictReader(file) if (value := row.get("val/action_accuracy"))]
    return f"{100 * float(values[-1]):.1f} %" if values else "-"


def _cost_cells(costs: dict[str, Any]) -> list[str]:
    size, seconds = costs["checkpoint_bytes"], costs["step_seconds"]
    return [
        _count(costs["trainable"]),
        f"{costs['trainable'] / costs['parameters']:.1%}",
        "-" if size is None else f"{size / 1e6:,.1f} MB",
        f"{costs['peak_memory_bytes'] / 1e9:.2f} GB",
        "-" if seconds is None else f"{1000 * seconds:,.0f} ms",
    ]


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 10_000_000 else f"{number:,}"
