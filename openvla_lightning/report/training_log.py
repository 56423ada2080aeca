"""`metrics.csv`, the log that every training run writes, read back and drawn."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOG = "metrics.csv"
"""Its name in the folder of a run."""

Rows = list[dict[str, str]]
Points = Sequence[tuple[int, float]]


def read_log(path: Path) -> Rows:
    """The rows of the log at `path`, or in the folder of a run; none where there is no log.

    A row whose line was cut short by a kill has no step, and is left out.
    """
    path = path / LOG if path.is_dir() else path
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]


def points(rows: Rows, metric: str) -> list[tuple[int, float]]:
    """(step, value) wherever a metric was logged."""
    return [(int(row["step"]), float(value)) for row in rows if (value := row.get(metric))]


def draw_curves(
    panels: Mapping[str, Mapping[str, Points]], picture: Path, marked: Sequence[str] = (), legend: bool = True
) -> bool:
    """Draw curves over the optimiser's steps as a PNG; False, and no picture, when none has a point.

    Args:
        panels: title -> label -> points; a panel without points is left out, its labels keep their colours.
        picture: the file.
        marked: titles or labels of curves with few points, which get a marker each.
        legend: name the labels below all panels; else within each.
    """
    from matplotlib.figure import Figure

    logged = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not logged:
        return False
    labels = dict.fromkeys(label for curves in logged.values() for label in curves)
    width = 4.25 * len(logged)
    columns = max(1, min(4, len(labels), int(width / (0.5 + 0.07 * max(map(len, labels))))))  # inches, of 8 pt letters
    below = 0.5 + 0.17 * -(-len(labels) // columns) if legend else 0.0
    figure = Figure(figsize=(width, 3.5 + below), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(logged), squeeze=False)[0], logged.items(), strict=True):
        for number, (label, found) in enumerate(curves.items()):
            if found:
                marker = "o" if {title, label} & set(marked) else None
                style: dict[str, Any] = {"marker": marker, "markersize": 3, "alpha": 0.8, "color": f"C{number}"}
                axes.plot(*zip(*found, strict=True), label=label, **style)
        axes.set(xlabel="optimiser step", title=title)
        axes.grid(alpha=0.3)
        if not legend:
            axes.legend()
    if legend:
        lines = [figure.axes[0].plot([], [], color=f"C{i}", label=label)[0] for i, label in enumerate(labels)]
        figure.legend(handles=lines, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(picture, dpi=110)
    return True
