"""Progress of training as a bar in a terminal or as lines in a log: steps, samples per second, remaining time."""

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
    """One bar over the whole run. Lightning's own bar shows epochs, which a stream lacks, and so no remaining time.

    If the output is a file, it gets a line every 30 seconds, and at least every 5 % of the steps. Each validation
    prints its numbers.

    Args:
        refresh_every: optimiser steps between updates.
    """

    def __init__(self, refresh_every: int = 5) -> None:
        super().__init__()
        self.refresh_every, self.enabled = refresh_every, True
        self.bar: Bar | None = None

    def enable(self) -> None:
        """Enable the bar, for Lightning."""
        self.enabled = True

    def disable(self) -> None:
        """Disable the bar, which Lightning does on every rank except the first."""
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar; a resumed run starts where it stopped."""
        if not self.enabled:
            return
        total = trainer.estimated_stepping_batches
        # max_steps=-1 runs until it is stopped, so there is no total and no remaining time
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
        if self.bar.due(trainer.global_step):  # reading values waits for the device
            self.bar.update(trainer.global_step, _shown(self.get_metrics(trainer, pl_module), SHOWN))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show that validation is running."""
        if self.bar is not None:
            self.bar.describe("validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the validation's numbers, and show that training continues."""
        if self.bar is not None:
            self.bar.describe("training")
            if not trainer.sanity_checking and (shown := _shown(trainer.callback_metrics, HELD_OUT)):
                self.bar.say(f"step {trainer.global_step:,}: held out {shown}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the last state on the screen."""
        if self.bar is not None:
            self.bar.update(trainer.global_step)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Release the terminal before the traceback is printed."""
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None


def _shown(values: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    return "  ".join(text.format(float(values[name])) for name, text in texts.items() if name in values)
