"""Samples per second, over windows of `trainer.log_every_n_steps`."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from openvla_lightning.types import Batch


class Throughput(Callback):
    """Logs `train/samples_per_second` (all ranks together) and `train/data_wait` (share of time without a batch)."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._restart()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the last batch ended as waiting for data."""
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch; log when Lightning does."""
        self._ended = time.perf_counter()
        self._samples += len(batch) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            elapsed = self._ended - self._started
            pl_module.log("train/samples_per_second", self._samples / elapsed, prog_bar=True)
            pl_module.log("train/data_wait", self._waited / elapsed)
            self._restart()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is not training time."""
        self._restart()

    def _restart(self) -> None:
        self._started = self._ended = time.perf_counter()
        self._samples, self._waited = 0, 0.0
