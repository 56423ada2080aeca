"""The numbers that a training run logged, read back from its CSV log."""

import csv
from pathlib import Path

FILE_NAME = "metrics.csv"

Curve = list[tuple[int, float]]
"""(optimiser step, value) wherever a metric was logged, in order."""


def curves(run: str | Path) -> dict[str, Curve]:
    """Every metric of the run in the folder `run`; none where it has no CSV log."""
    log, found = Path(run) / FILE_NAME, dict[str, Curve]()
    if not log.is_file():
        return found
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found.setdefault(name, []).append((step, float(value)))
    return found
