"""A picture of the run, drawn from its CSV log."""

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

PANELS = {"loss": "cross-entropy", "action_accuracy": "action-token accuracy", "l1": "L1, normalised units"}


class LearningCurve(Callback):
    """Draws `learning_curve.png` when training ends: loss, accuracy and L1, on training and held-out steps.

    Args:
        dirpath: folder of the run, where `metrics.csv` is.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what was logged; nothing, if this run has no CSV log."""
        if (self.dirpath / "metrics.csv").exists():
            draw(self.dirpath / "metrics.csv", self.dirpath / "learning_curve.png")


def draw(log: Path, picture: Path) -> None:
    """Plot the CSV log of a run as a PNG."""
    from matplotlib.figure import Figure

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for split in ("train", "val"):
            points = [(int(row["step"]), float(value)) for row in rows if (value := row.get(f"{split}/{metric}"))]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, marker="o" if split == "val" else None, markersize=3)
        axes.set(xlabel="optimiser step", title=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)
