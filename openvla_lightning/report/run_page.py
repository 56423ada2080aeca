"""A training run on one page: what was typed, what came out, curves, samples and rollouts."""

import json
from pathlib import Path
from typing import Any

import yaml

from openvla_lightning.report.page import RUN_PAGE, escape, write_page
from openvla_lightning.report.results import FILE_NAME, Results
from openvla_lightning.report.sweeps import FILE_NAME as COSTS
from openvla_lightning.report.sweeps import cost_cells
from openvla_lightning.report.tables import Rows, markdown
from openvla_lightning.report.training_log import LOG, points, read_log
from openvla_lightning.report.writing import task_rows
from openvla_lightning.runtime.files import below

PICTURES = {
    "learning_curve.png": "What was logged of training and of held-out steps",
    "samples.png": "Held-out steps of the last validation: image, instruction, and for each dimension of the action "
    "what was demonstrated and what is predicted over the chunk, in the dataset's units",
}
SHOWN = ("loss", "action_accuracy", "token_accuracy", "l1", "distinct_actions")


def is_run(folder: Path) -> bool:
    """Whether `folder` is that of one training run."""
    return (folder / LOG).is_file()


def write_run_page(run: str | Path) -> Path:
    """Write `report.md` and `report.html` into the folder of a training run and return the path of the former.

    It holds the overrides that were typed, the last value of each metric, costs, the pictures that callbacks left, and
    every evaluation below the folder.
    """
    run = Path(run)
    lines = [f"# {escape('/'.join(run.parts[-2:]))}", "", *_typed(run)]
    lines += ["## What came out", "", markdown(metric_rows(run)), ""]
    if (run / COSTS).is_file():
        cells = cost_cells(json.loads((run / COSTS).read_text(encoding="utf-8")))
        lines += [", ".join(f"{name} {cell}" for name, cell in cells.items()) + ".", ""]
    for picture, caption in PICTURES.items():
        if (run / picture).is_file():
            lines += [f"![{caption}]({picture})", "", f"{caption}.", ""]
    for path in sorted(below(run, FILE_NAME)):
        lines += _rollouts(run, path)
    lines += ["## Files", "", *(f"- `{path.relative_to(run)}`" for path in sorted(run.glob("checkpoints/*.ckpt")))]
    return write_page(lines, run / RUN_PAGE)


def metric_rows(run: Path) -> Rows:
    """Header and a row per metric: its last value on training and on held-out steps, and at which step."""
    log, rows = read_log(run), [["", "training", "held out"]]
    for metric in SHOWN:
        curves = [points(log, f"{split}/{metric}") for split in ("train", "val")]
        cells = [f"{curve[-1][1]:.4g} (step {curve[-1][0]:,})" if curve else "-" for curve in curves]
        if any(curves):
            rows.append([metric.replace("_", " "), *cells])
    return rows


def _typed(run: Path) -> list[str]:
    path = run / ".hydra" / "overrides.yaml"
    overrides: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not overrides:
        return []
    return ["Overrides: " + ", ".join(f"`{text}`" for text in overrides), ""]


def _rollouts(run: Path, path: Path) -> list[str]:
    results = Results.load(path)
    if not results.episodes:
        return []
    place = path.parent.relative_to(run)
    lines = [f"## Rollouts: {escape(results.task_set)} tasks of {escape(results.env)}", ""]
    lines += [markdown(task_rows(results)), ""]
    for episode in results.episodes:
        if episode.video:
            said = f"{'success' if episode.success else 'failure'}: {escape(episode.instruction)}"
            lines.append(f"- [{said}]({(place / episode.video).as_posix()})")
    return [*lines, ""]
