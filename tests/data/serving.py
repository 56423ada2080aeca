"""DataModules over small data, and a training that remembers what it was given."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import toy_rlds

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.types import Step

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def random_data(**options: Any) -> VLADataModule:
    defaults: dict[str, Any] = {"mix": {"kuka": 1.0, "bridge_orig": 0.5}, "collate": list, "num_workers": 0}
    defaults |= {"image_size": 16, "global_batch_size": 8}
    return VLADataModule(partial(Synthetic, num_steps=64, image_size=16), **defaults | options)


def toy(root: Path, **options: Any) -> VLADataModule:
    defaults: dict[str, Any] = {
        "mix": {"toy": 1.0},
        "collate": list,
        "num_workers": 0,
        "datasets": {"toy": toy_rlds.SPEC},
    }
    defaults |= {"image_size": toy_rlds.SIZE, "global_batch_size": 4}
    return VLADataModule(partial(RLDS, root), **defaults | options)


def opened(data: VLADataModule) -> VLADataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def same(one: list[list[Step]], two: list[list[Step]]) -> bool:
    def plain(batches: list[list[Step]]) -> list[Any]:
        return [
            [
                (
                    s.dataset_name,
                    s.observation.instruction,
                    s.action.tobytes(),
                    *(i.tobytes() for i in s.observation.images.values()),
                )
                for s in b
            ]
            for b in batches
        ]

    return plain(one) == plain(two)


class Recorder(L.LightningModule):
    """Remembers which steps it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch: list[Step], batch_idx: int) -> torch.Tensor:
        self.seen.append([step.action.tobytes() for step in batch])
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: list[Step], batch_idx: int) -> None:
        assert batch

    def transfer_batch_to_device(self, batch: list[Step], device: torch.device, dataloader_idx: int) -> list[Step]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class StopAfter(L.Callback):
    """Ends training early, as if it had been killed there."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def train(
    steps: int, save: Path, resume: Path | None = None, accumulate: int = 1, stop: int | None = None, **options: Any
) -> list[Any]:
    trainer = L.Trainer(
        callbacks=[StopAfter(stop or steps)],
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate,
        overfit_batches=options.pop("overfit_batches", 0),
    )
    module = Recorder()
    trainer.fit(module, random_data(**options), ckpt_path=str(resume) if resume else None)
    trainer.save_checkpoint(save)
    return module.seen
