"""A table of the parameters that learn, before training starts."""

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from openvla_lightning.model.parameters import count


class ParameterTable(Callback):
    """Prints once how many parameters each part has and how many of them learn."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table."""
        if trainer.is_global_zero:
            Console(stderr=True).print(parameter_table(pl_module.vla))  # type: ignore[arg-type]


def parameter_table(vla: torch.nn.Module) -> Table:
    """A table with the columns part, parameters and learning; the last row is the sum."""
    table = Table("part", title="Parameters", title_justify="left")
    for column in ("all", "learning"):
        table.add_column(column, justify="right")
    parts: Sequence[tuple[str, torch.nn.Module]] = [*vla.named_children(), ("total", vla)]
    for name, part in parts:
        table.add_row(name, *(f"{number:,}" for number in count(part)))
    return table
