"""Speed of training and of its parts, over windows of `trainer.log_every_n_steps`."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from openvla_lightning.action_head import ActionHead
from openvla_lightning.callbacks.clock import Clock
from openvla_lightning.cost.cards import card
from openvla_lightning.cost.operations import step_cost
from openvla_lightning.model import VLA
from openvla_lightning.types import Batch

PHASES = ("data", "forward", "backward", "optimiser")


class Throughput(Callback):
    """Logs the speed of training.

    - `train/samples_per_second`, of all ranks together;
    - `train/step_seconds` of an optimiser step and its parts `train/step_seconds/data` (waiting for a batch),
      `forward`, `backward` and `optimiser` (with clipping); on a GPU, the device's time, read when a window ends;
    - `train/data_wait`: share of the time spent waiting for a batch;
    - `train/mfu`: model FLOPs utilisation: the model's operations (without recomputation) per second over the card's
      peak, if that is known;
    - `train/peak_memory_gb`, 10^9 bytes, on a GPU.

    Args:
        peak_tflops: 10^12 operations per second of one device; None: from the card's data sheet.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.flops_per_sample: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up the card's peak and start the clock."""
        self.clock = Clock(on_gpu=trainer.strategy.root_device.type == "cuda")
        if self.peak_tflops is None and self.clock.on_gpu:
            known = card(torch.cuda.get_device_name())
            self.peak_tflops = None if known is None else known.tflops
        self._restart(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Count the time since the last batch ended as waiting for data."""
        if self.peak_tflops is not None and self.flops_per_sample is None:
            module: Any = pl_module
            sample = module.processor.normalise(batch.rows(0, 1))
            self.flops_per_sample = model_flops(module.vla, module.strategy, module.action_head, sample)
            self._restart(trainer.global_step)
        self._seconds["data"] += time.perf_counter() - self._ended
        self._marks.append(self.clock.mark())

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Mark the end of the forward pass."""
        self._marks.append(self.clock.mark())

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the end of the backward pass."""
        self._marks.append(self.clock.mark())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch; log at the same steps as Lightning."""
        self._marks.append(self.clock.mark())
        self._ended = time.perf_counter()
        self._samples += len(batch)
        step = trainer.global_step
        if step > self._first_step and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = self._measured(step - self._first_step, trainer.world_size)
            for name, value in values.items():
                pl_module.log(f"train/{name}", value, prog_bar=name in ("samples_per_second", "mfu"))
            self._restart(step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the window, because validation is not training time."""
        self._restart(trainer.global_step)

    def _measured(self, steps: int, world_size: int) -> dict[str, float]:
        elapsed = self._ended - self._started
        for place in range(0, len(self._marks) - 3, 4):
            for phase, begin in zip(PHASES[1:], range(place, place + 3), strict=True):
                self._seconds[phase] += self.clock.seconds(*self._marks[begin : begin + 2])
        rate = self._samples / elapsed
        values = {
            "samples_per_second": rate * world_size,
            "data_wait": self._seconds["data"] / elapsed,
            "step_seconds": elapsed / steps,
            **{f"step_seconds/{phase}": seconds / steps for phase, seconds in self._seconds.items()},
        }
        if self.flops_per_sample is not None and self.peak_tflops is not None:
            values["mfu"] = rate * self.flops_per_sample / (self.peak_tflops * 1e12)
        if self.clock.on_gpu:
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return values

    def _restart(self, step: int) -> None:
        self._started = self._ended = time.perf_counter()
        self._first_step, self._samples = step, 0
        self._marks: list[Any] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)


def model_flops(vla: VLA, strategy: Any, head: ActionHead, batch: Batch) -> float:
    """Operations of a forward and backward pass of one sample, counted on a copy of the model without memory."""
    with torch.device("meta"):
        twin = VLA.from_config(vla.config)
        strategy.apply(twin)
    cost = step_cost(twin, head, batch, autocast=True)
    return cost.forward + cost.backward
