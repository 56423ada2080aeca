"""The progress bar: optimiser steps out of all steps, with samples per second and the time left."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SHOWN = {
    "train/loss": "loss {:.3f}",
    "train/action_accuracy": "accuracy {:.3f}",
    "train/token_accuracy": "accuracy {:.3f}",
    "train/samples_per_second": "{:.0f} samples/s",
    "train/mfu": "{:.0%} of peak",
}


class Progress(ProgressBar):
    """One line over the whole run: a stream has no epochs, so Lightning's own bar knows no time of arrival.

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
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Bar(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"), console=Console(stderr=True)
        )
        total = trainer.estimated_stepping_batches
        # max_steps=-1 runs until it is stopped: there is no total, hence no time of arrival
        self.task = self.bar.add_task(
            "training", total=None if total == float("inf") else total, completed=trainer.global_step, metrics=""
        )
        self.bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self.bar is not None and trainer.global_step % self.refresh_every == 0:
            values = self.get_metrics(trainer, pl_module)
            shown = [text.format(values[name]) for name, text in SHOWN.items() if name in values]
            self.bar.update(self.task, completed=trainer.global_step, metrics="  ".join(shown))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that the pause is validation."""
        if self.bar is not None:
            self.bar.update(self.task, description="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that training goes on."""
        if self.bar is not None:
            self.bar.update(self.task, description="training")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state on screen."""
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the traceback is printed."""
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
