"""A picture of the run, drawn from its CSV log."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from openvla_lightning.report.metrics_log import curves

PANELS = {
    "loss": "cross-entropy",
    "action_accuracy": "action-token accuracy",
    "token_accuracy": "token accuracy of answers",
    "l1": "L1, normalised units",
}


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
        draw(self.dirpath, self.dirpath / "learning_curve.png")


def draw(run: Path, picture: Path) -> None:
    """Plot the CSV log of a run as a PNG."""
    from matplotlib.figure import Figure

    found = curves(run)
    splits = ("train", "val")
    logged = [metric for metric in PANELS if any(f"{split}/{metric}" in found for split in splits)]
    if not logged:
        return
    figure = Figure(figsize=(4 * len(logged), 3.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(logged), squeeze=False)[0], logged, strict=True):
        for split in splits:
            if points := found.get(f"{split}/{metric}"):
                axes.plot(*zip(*points, strict=True), label=split, marker="o" if split == "val" else None, markersize=3)
        axes.set(xlabel="optimiser step", title=PANELS[metric])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)
