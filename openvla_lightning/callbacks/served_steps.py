"""The share of each dataset that was served to training, beside the share that the weights intend."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text


class ServedSteps(Callback):
    """Logs `mixture/served/<dataset>` and `mixture/intended/<dataset>`, shares of all samples so far; prints a table.

    With a single dataset, it logs nothing.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the same steps as Lightning."""
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        served = trainer.datamodule.served()  # type: ignore[attr-defined]
        total = sum(steps for steps, _ in served.values())
        if len(served) > 1 and total:
            for name, (steps, intended) in served.items():
                pl_module.log(f"mixture/served/{name}", steps / total)
                pl_module.log(f"mixture/intended/{name}", intended / total)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table."""
        served = trainer.datamodule.served()  # type: ignore[attr-defined]
        total = sum(steps for steps, _ in served.values())
        if len(served) < 2 or not total:
            return
        table = Table("dataset", title="Served", title_justify="left")
        for column in ("steps", "share", "intended"):
            table.add_column(column, justify="right")
        for name, (steps, intended) in sorted(served.items(), key=lambda item: -item[1][0]):
            table.add_row(Text(name), f"{steps:,}", f"{steps / total:.2%}", f"{intended / total:.2%}")
        Console(stderr=True).print(table)
