"""Early warnings of a model that predicts the same for all inputs, and of an accuracy that no longer rises."""

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from openvla_lightning.types import Batch

log = logging.getLogger(__name__)
GOOD = 0.5
"""Action-token accuracy above which a plateau gives no warning."""


class CollapseWarning(Callback):
    """Logs `val/distinct_actions` and warns of collapse at validation.

    The number is the ratio of distinct predicted to distinct demonstrated actions in one held-out batch.

    Args:
        patience: validations without a gain in `val/action_accuracy` before it counts as stuck.
        min_gain: smallest gain that counts.
    """

    def __init__(self, patience: int = 4, min_gain: float = 0.01) -> None:
        self.patience, self.min_gain = patience, min_gain
        self.best, self.waited = 0.0, 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compare the actions predicted for the first batch with each other."""
        if batch_idx or dataloader_idx or len(batch) < 2 or not batch.actions.numel():
            return
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            _, prediction = pl_module(batch)
        distinct, expected = (len(chunks.unique(dim=0)) for chunks in (prediction.actions, prediction.targets))
        pl_module.log("val/distinct_actions", distinct / expected, batch_size=len(batch), sync_dist=True)
        if distinct == 1 < expected and trainer.is_global_zero and trainer.global_step:
            log.warning(
                f"step {trainer.global_step}: the same action is predicted for all of {len(batch)} held-out images, "
                f"{expected} different ones were demonstrated. Normal in the first steps; if it lasts, the learning "
                "rate is too high (optim.lr) or the pictures say nothing (look at them: data report, env=open_loop)"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if the accuracy is low and no longer rises."""
        accuracy = trainer.callback_metrics.get("val/action_accuracy")
        if accuracy is None:
            return
        if float(accuracy) > self.best + self.min_gain:
            self.best, self.waited = float(accuracy), 0
            return
        self.waited += 1
        if self.waited == self.patience and self.best < GOOD and trainer.is_global_zero:
            log.warning(
                f"step {trainer.global_step}: val/action_accuracy has not risen above {self.best:.3f} in "
                f"{self.patience} validations. Successful policies reach 0.95 in the paper: more steps, another "
                "learning rate (optim.lr), more of what learns (strategy, rank), or data that contradicts itself"
            )

    def state_dict(self) -> dict[str, Any]:
        """The best accuracy and how long ago it was, for a resumed run."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]
