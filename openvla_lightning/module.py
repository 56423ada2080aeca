"""The LightningModule, for pretraining and fine-tuning of models of any size."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

import openvla_lightning
from openvla_lightning.action_head import ActionHead
from openvla_lightning.action_head.tokens import next_token_logits
from openvla_lightning.checkpoint.format import Base
from openvla_lightning.checkpoint.formats import base_at
from openvla_lightning.checkpoint.load import start_from
from openvla_lightning.checkpoint.training import check_adapter, learnt_names
from openvla_lightning.model import VLA
from openvla_lightning.model.blocks import Recompute, compile_blocks, recompute_activations
from openvla_lightning.model.llm import next_token_loss
from openvla_lightning.optim import AdamW
from openvla_lightning.parallel import FSDP
from openvla_lightning.plugins import USUAL_HEAD, describe
from openvla_lightning.processor import Processor
from openvla_lightning.quantisation import Quantiser, plain_state
from openvla_lightning.strategy import Strategy, to_config
from openvla_lightning.types import Batch, Prediction


class VLAModule(L.LightningModule):
    """Trains a VLA on `Batch`es.

    Args:
        model: builds the VLA, given `action_head`; called once, in `configure_model`, so that creating this module
            loads no weights.
        strategy: which weights learn.
        optim: optimiser and schedule.
        processor: saved in the checkpoint, so that inference preprocesses as in training.
        action_head: writes actions and computes the loss.
        recipe: the resolved config, kept in every checkpoint under `hyper_parameters`.
        quantisation: quantises the frozen weights before the strategy adds adapters; None: no quantisation.
        checkpoint_activations: which blocks recompute their activations in the backward pass, to save memory:
            `none`, `selective` (every second one) or `full`.
        compile_blocks: compile each block at its first use.

    Raises:
        ValueError: when quantised weights should learn.
    """

    vla: VLA
    gradient_norm: Tensor | None = None
    """Norm of all gradients before the next optimiser step; None until it is computed."""

    def __init__(
        self,
        model: Callable[..., VLA],
        strategy: Strategy,
        optim: AdamW,
        processor: Processor,
        action_head: ActionHead,
        recipe: dict[str, Any] | None = None,
        quantisation: Quantiser | None = None,
        checkpoint_activations: Recompute = "none",
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.build, self.strategy, self.optim = model, strategy, optim
        self.processor, self.action_head = processor, action_head
        if quantisation is not None and not strategy.adapts:
            raise ValueError("quantised weights cannot learn: choose strategy=qlora, or quantisation=none")
        if quantisation is not None and not quantisation.trains:
            raise ValueError("this quantisation is for acting alone: to train adapters on top choose int4 or int8")
        self.quantisation = quantisation
        self.checkpoint_activations, self.compile_blocks = checkpoint_activations, compile_blocks
        self.base: Base | None = None
        if recipe is not None:
            self.save_hyperparameters(recipe, logger=False)

    def check(self, strategy: L.pytorch.strategies.Strategy) -> None:
        """Check, before anything is built, whether `strategy` can train this module.

        Raises:
            ValueError: when it cannot be sharded.
        """
        if not isinstance(strategy, FSDP):
            return
        if self.quantisation is not None:
            raise ValueError("quantised weights cannot be sharded: choose trainer=ddp, or quantisation=none")
        if self.optim.kind == "adamw_8bit":
            raise ValueError("adamw_8bit cannot be sharded: choose optim.kind=adamw_bf16, or trainer=ddp")

    def configure_model(self) -> None:
        """Build the VLA once, choose which weights learn, and shard it if the trainer asks for it."""
        if hasattr(self, "vla"):
            return
        strategy = self.trainer.strategy
        self.check(strategy)
        self.vla = strategy.build(self._learner) if isinstance(strategy, FSDP) else self._learner()
        if isinstance(strategy, FSDP):
            self.vla.about = strategy.broadcast(self.vla.about)  # only the first process opened the files
        if self.strategy.adapts and self.vla.about.weights_from is not None:
            # checkpoints name the base and hold only the adapter
            self.base = strategy.broadcast(
                base_at(self.vla.about.weights_from) if self.trainer.is_global_zero else None
            )
            self.strict_loading = False
        self.vla.train()  # Lightning does not; frozen batch normalisation stays in eval mode
        if self.compile_blocks:
            compile_blocks(self.vla)
        recompute_activations(self.vla, self.checkpoint_activations)
        if isinstance(strategy, FSDP):
            strategy.shard(self.vla)

    def _learner(self) -> VLA:
        """The model, after the strategy chose which weights learn."""
        proprio_dim = self.trainer.datamodule.proprio_dim if self.processor.proprio else None  # type: ignore[attr-defined]
        arguments = {} if proprio_dim is None else {"proprio_dim": proprio_dim}
        vla = self.build(action_head=self.action_head, **arguments)
        start_from(vla)
        if self.quantisation is not None:
            self.quantisation(vla, torch.get_default_device())
            self.strict_loading = False
        self.strategy.apply(vla)
        return vla

    def setup(self, stage: str) -> None:
        """Create the metrics, one row per dataset of the mixture."""
        self.train_loss = MeanMetric(nan_strategy="disable")  # a check for NaN would wait for the device
        self.train_metrics = self.action_head.metrics(list(self._statistics()))
        self.val_metrics = self.action_head.metrics(list(self._statistics()))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy without waiting for the device; Lightning's own method does this only for plain tensors."""
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of `batch`."""
        loss, _ = self._step(batch, self.train_metrics)
        self.train_loss.update(loss.detach())
        return loss

    def on_train_start(self) -> None:
        """Log nothing before the next optimiser step; a resumed run learns as its command says."""
        self.logged_step = self.trainer.global_step
        for optimizer, schedule in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            self.optim.take_over(optimizer, schedule.scheduler)  # type: ignore[arg-type]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Every `trainer.log_every_n_steps`, log means over all ranks, batches and steps since the last log."""
        step = self.trainer.global_step
        if step == self.logged_step or step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self.logged_step = step
        self.log("train/loss", self.train_loss.compute(), prog_bar=True)
        for name, value in self.train_metrics.compute().items():
            self.log(f"train/{name}", value, prog_bar=name.endswith("_accuracy"))
        self.train_loss.reset()
        self.train_metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Prediction]:
        """Log the loss of a held-out batch and collect its accuracy and L1; callbacks get the `prediction`."""
        loss, prediction = self._step(batch, self.val_metrics)
        self.log("val/loss", loss, batch_size=len(batch), sync_dist=True, add_dataloader_idx=False)
        return {"prediction": prediction}

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and L1 over the whole validation pass."""
        values = {f"val/{name}": value for name, value in self.val_metrics.compute().items()}
        self.log_dict(values, sync_dist=True)  # equal on all ranks; without `sync_dist`, Lightning warns
        self.val_metrics.reset()

    def forward(self, batch: Batch) -> tuple[Tensor, Prediction]:
        """The loss of a training or validation batch, and the prediction for metrics and callbacks."""
        loss, prediction = self.action_head.loss(self.vla, self.processor.normalise(batch, self.dtype))  # type: ignore[arg-type]
        if batch.words is not None:
            words = self.processor.normalise(batch.words, self.dtype)  # type: ignore[arg-type]
            targets = words.labels[:, 1:].gather(1, words.places)
            loss = loss + next_token_loss(next_token_logits(self.vla, words), targets)
        return loss, prediction

    def _step(self, batch: Batch, metrics: Metric) -> tuple[Tensor, Prediction]:
        loss, prediction = self(batch)
        with torch.no_grad():
            metrics.update(prediction, batch)
        return loss, prediction

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients; Lightning's own refuses fused optimisers under mixed precision."""
        norm, self.gradient_norm = self.gradient_norm, None
        if not gradient_clip_val:
            return
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.vla.parameters() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.vla.parameters(), gradient_clip_val, norm)

    def configure_optimizers(self) -> Any:
        """AdamW over the weights that learn."""
        mixed = str(self.trainer.precision).endswith("-mixed")
        steps = self.trainer.estimated_stepping_batches
        return self.optim.build(self.vla.parameters(), steps, fused=mixed or self.device.type == "cuda")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add everything that rebuilding the policy needs, as plain types, so that loading unpickles no class."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["openvla_lightning"] = {
            "version": openvla_lightning.__version__,
            "vla": self.vla.config,
            # after training on random crops, the policy acts on the centre crop, as the released evaluation does
            "processor": {**self.processor.config, "crop_area": data.crop_area},
            "action_head": describe(self.action_head, USUAL_HEAD),
            "strategy": to_config(self.strategy),
            "quantisation": self.vla.quantisation,
            "base": None if self.base is None else asdict(self.base),
            "normalisation": data.normalisation,
            "norm_stats": {
                **{key: {**stats, "latest": False} for key, stats in self.vla.norm_stats.items()},
                **{key: {**stats.to_dict(), "latest": True} for key, stats in self._statistics().items()},
            },
        }
        if self.base is not None:
            checkpoint["state_dict"] = self._learnt(checkpoint["state_dict"])
        elif self.quantisation is not None:
            state = plain_state(self.vla, self.vla.state_dict())
            checkpoint["state_dict"] = {f"vla.{name}": tensor for name, tensor in state.items()}
        checkpoint["rng_state"] = torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["cuda_rng_state"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of the random numbers; refuse an adapter of another base."""
        check_adapter(checkpoint, self.base, self.vla)
        if self.quantisation is not None:  # frozen weights are loaded already, random ones included
            checkpoint["state_dict"] = self._learnt(checkpoint["state_dict"])
        if (state := checkpoint.get("rng_state")) is not None:
            torch.set_rng_state(state)
        if self.device.type == "cuda" and (state := checkpoint.get("cuda_rng_state")) is not None:
            torch.cuda.set_rng_state(state, self.device)

    def _learnt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        learnt = {f"vla.{name}" for name in learnt_names(self.vla)}
        return {name: tensor for name, tensor in state.items() if name in learnt}

    def _statistics(self) -> dict[str, Any]:
        return self.trainer.datamodule.statistics  # type: ignore[attr-defined]
