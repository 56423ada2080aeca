"""What the model sees, is asked and would do, as a table at each validation."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from openvla_lightning.types import IGNORE_INDEX, Batch

COLUMNS = ("image", "prompt", "dataset", "demonstrated", "predicted", "l1")


class Samples(Callback):
    """Logs the table `val/samples` to Weights & Biases; without that logger it does nothing.

    Actions are the first of their chunk, in the dataset's units; `l1` is in normalised ones. As in the metrics, each is
    predicted under the demonstrated past.

    Args:
        count: rows, of the first held-out batch.
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predict and log, on every rank: a sharded model needs all of them."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or batch_idx or dataloader_idx or trainer.sanity_checking or not batch.actions.numel():
            return
        batch = batch.rows(0, self.count)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            _, prediction = pl_module(batch)
        true, predicted = batch.actions.cpu().numpy(), prediction.actions.float().cpu().numpy()
        if trainer.is_global_zero:
            for logger in loggers:
                rows = self._rows(trainer, pl_module, batch, true, predicted)
                logger.log_table("val/samples", columns=list(COLUMNS), data=rows, step=trainer.global_step)

    def _rows(self, trainer: L.Trainer, pl_module: Any, batch: Batch, true: Any, predicted: Any) -> list[list[Any]]:
        import wandb

        data, tokenizer = trainer.datamodule, pl_module.processor.tokenizer  # type: ignore[attr-defined]
        rows = []
        for row, name in enumerate(batch.dataset_names):
            asked = batch.attention_mask[row] & (batch.labels[row] == IGNORE_INDEX)
            actions = [
                data.statistics[name].unnormalise(actions[row, 0], method=data.normalisation)
                for actions in (true, predicted)
            ]
            rows.append(
                [
                    wandb.Image(batch.pixel_values[row].permute(1, 2, 0).cpu().numpy()),
                    tokenizer.decode(batch.input_ids[row][asked], skip_special_tokens=True),
                    name,
                    *(np.array2string(action, precision=3, suppress_small=True) for action in actions),
                    float(np.abs(true[row] - predicted[row]).mean()),
                ]
            )
        return rows
