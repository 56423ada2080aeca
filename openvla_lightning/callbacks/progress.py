"""How far training is: a bar in a terminal, lines in a log; optimiser steps, samples per second, the time left."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from openvla_lightning.runtime.progress import Bar

SHOWN = {
    "train/loss": "loss {:.3f}",
    "train/action_accuracy": "accuracy {:.3f}",
    "train/token_accuracy": "accuracy {:.3f}",
    "train/samples_per_second": "{:.0f} samples/s",
    "train/mfu": "{:.0%} of peak",
}
HELD_OUT = {
    "val/loss": "loss {:.3f}",
    "val/action_accuracy": "accuracy {:.3f}",
    "val/token_accuracy": "accuracy {:.3f}",
}
HELD_OUT |= {"val/l1": "L1 {:.4f}"}


class Progress(ProgressBar):
    """One bar over the whole run: a stream has no epochs, so Lightning's own bar knows no time of arrival.

    Where the output is a file there is a line every 30 seconds, and at least every 5 % of the steps. Each validation
    says its numbers, in a terminal and in a file.

    Args:
        refresh_every: optimiser steps between updates.
    """

    def __init__(self, refresh_every: int = 5) -> None:
        super().__init__()
        self.refresh_every, self.enabled = refresh_every, True
        self.bar: Bar | None = None

    def enable(self) -> None:
        """As Lightning asks."""
        self.enabled = True

    def disable(self) -> None:
        """As Lightning asks, on every rank but the first."""
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar; a resumed run starts where it stopped."""
        if not self.enabled:
            return
        total = trainer.estimated_stepping_batches
        # max_steps=-1 runs until it is stopped: there is no total, hence no time of arrival
        steps = None if total == float("inf") else int(total)
        self.bar = Bar("training", steps, "steps", done=trainer.global_step)
        self.bar.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self.bar is None:
            return
        if self.bar.drawn and trainer.global_step % self.refresh_every:
            return
        if self.bar.due(trainer.global_step):  # reading numbers waits for the device
            self.bar.update(trainer.global_step, _shown(self.get_metrics(trainer, pl_module), SHOWN))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that the pause is validation."""
        if self.bar is not None:
            self.bar.describe("validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was found, and that training goes on."""
        if self.bar is not None:
            self.bar.describe("training")
            if not trainer.sanity_checking and (found := _shown(trainer.callback_metrics, HELD_OUT)):
                self.bar.say(f"step {trainer.global_step:,}: held out {found}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state on screen."""
        if self.bar is not None:
            self.bar.update(trainer.global_step)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the traceback is printed."""
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None


def _shown(values: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    return "  ".join(text.format(float(values[name])) for name, text in texts.items() if name in values)
