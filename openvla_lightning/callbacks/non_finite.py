"""Stops a training when gradients are not finite, before they change the weights."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from openvla_lightning.types import Batch

NAMED = 8
"""Largest number of samples that the message names."""


class NonFiniteError(RuntimeError):
    """The loss or a gradient is infinite or not a number."""


class StopOnNonFinite(Callback):
    """Raises NonFiniteError instead of taking an optimiser step with gradients that are not finite.

    It computes the gradients' norm and stores it in the module's `gradient_norm`, which clipping then uses.

    The weights and all checkpoints stay as they were after the last good step. A fused optimiser skips
    such a step by itself, so that the host need not wait for the device; the error then comes one step later.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.pending: tuple[Tensor, int, list[Batch]] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect the parameters once, because walking through all modules takes a millisecond in every step."""
        self.parameters = list(pl_module.parameters())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batches of the next optimiser step."""
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Compute the norm of all gradients over all ranks."""
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        pl_module.gradient_norm = norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded
        batches, self.batches = self.batches, []
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            fused: Any = optimizer
            fused.found_inf = (~norm.isfinite()).float()  # as a gradient scaler does for fused optimisers
            self.check(trainer, pl_module)
            self.pending = fused.found_inf, trainer.global_step, batches
        elif not bool(norm.isfinite()):
            self.stop(trainer, pl_module, trainer.global_step, batches)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the last step."""
        self.check(trainer, pl_module)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the previous step, which the device has finished."""
        if self.pending is not None and bool(self.pending[0]):
            self.stop(trainer, pl_module, *self.pending[1:])

    def stop(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int, batches: list[Batch]) -> None:
        """Find the faulty samples and raise NonFiniteError."""
        samples = [sample for batch in batches for sample in self.suspects(trainer, pl_module, batch)]
        where = trainer.datamodule.where  # type: ignore[attr-defined]
        named = [f"{name}, {where(number)}" for name, number in samples[:NAMED]]
        more = f"and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
        raise NonFiniteError(
            "\n    ".join(
                [
                    f"step {step}: the gradients are not finite, so this step was not taken. The weights are those of "
                    "the step before and the last checkpoint is whole. The loss is not finite for"
                    + (f" {len(samples)} of {sum(map(len, batches))} samples:" if samples else " none of the samples."),
                    *named,
                    *([more] if more else []),
                    "All of them: the learning rate is too high (optim.lr), or training had diverged before. Some: "
                    "look at these (data report). None: the overflow is in the backward pass; try "
                    "trainer.precision=32-true.",
                ]
            )
        )

    def suspects(self, trainer: L.Trainer, pl_module: Any, batch: Batch) -> list[tuple[str, int]]:
        """(dataset, number) of the samples whose own loss is not finite."""
        not_finite = []
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for row, (name, number) in enumerate(zip(batch.dataset_names, batch.numbers, strict=True)):
                sample = batch.rows(row, row + 1)
                if not bool(pl_module(sample)[0].isfinite()):
                    not_finite.append((name, number))
        return not_finite
