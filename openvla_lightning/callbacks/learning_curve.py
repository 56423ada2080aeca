"""A picture of the run, drawn from its CSV log."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from openvla_lightning.report.training_log import draw_curves, points, read_log

PANELS = {
    "loss": "loss",
    "action_accuracy": "action-token accuracy",
    "token_accuracy": "token accuracy of answers",
    "l1": "L1, normalised units",
}


class LearningCurve(Callback):
    """Draws `learning_curve.png` when training ends: the loss, and accuracy and L1 where the head has them.

    Args:
        dirpath: folder of the run, where `metrics.csv` is.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the logged values; do nothing if this run has no CSV log."""
        rows = read_log(self.dirpath)
        panels = {
            title: {split: points(rows, f"{split}/{metric}") for split in ("train", "val")}
            for metric, title in PANELS.items()
        }
        draw_curves(panels, self.dirpath / "learning_curve.png", marked=["val"], legend=False)
