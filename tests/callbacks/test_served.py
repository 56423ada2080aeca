"""What is said about the mixture is what training was given, also after a restart."""

from collections import Counter
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from quiet import QUIET

from openvla_lightning.callbacks import ServedSteps
from openvla_lightning.data import VLADataModule
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.types import Step


class Counts(L.LightningModule):
    """Counts what it is given, in the checkpoint too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.given = torch.nn.Parameter(torch.zeros(1)), Counter[str]()

    def training_step(self, batch: list[Step], batch_idx: int) -> torch.Tensor:
        self.given.update(step.dataset_name for step in batch)
        return self.weight.sum()

    def validation_step(self, batch: list[Step], batch_idx: int) -> None:
        assert batch

    def transfer_batch_to_device(self, batch: list[Step], device: torch.device, dataloader_idx: int) -> list[Step]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["given"] = dict(self.given)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.given = Counter(checkpoint["given"])


def fit(steps: int, resume: Path | None = None) -> tuple[L.Trainer, Counts, VLADataModule]:
    data = VLADataModule(
        partial(Synthetic, num_steps=64, image_size=8),
        mix={"kuka": 1.0, "bridge_orig": 0.5},
        curriculum=[{"after": 10, "mix": {"bridge_orig": 0.0, "toto": 2.0}}],
        collate=list,
        image_size=8,
        global_batch_size=8,
        num_workers=0,
    )
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[ServedSteps()],
        log_every_n_steps=5,
        **QUIET,
    )
    model = Counts()
    trainer.fit(model, data, ckpt_path=str(resume) if resume else None)
    return trainer, model, data


def test_served_and_intended_shares_are_those_of_the_whole_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, _, _ = fit(7)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    capfd.readouterr()
    trainer, model, data = fit(20, tmp_path / "x.ckpt")
    given = {name: model.given[name] for name in data.train}
    assert sum(given.values()) == 20 * 8
    assert {name: steps for name, (steps, _) in data.served().items()} == given
    intended = {name: steps for name, (_, steps) in data.served().items()}
    # weight x size, of sizes 80 each: 2 to 1 for ten steps, then 1 to 2 with the third dataset
    assert intended == pytest.approx({"kuka": 80 * (2 / 3 + 1 / 3), "bridge_orig": 80 / 3, "toto": 80 * 2 / 3})
    for name in data.train:
        assert trainer.callback_metrics[f"mixture/served/{name}"] == pytest.approx(given[name] / 160)
        assert trainer.callback_metrics[f"mixture/intended/{name}"] == pytest.approx(intended[name] / 160)
    table = capfd.readouterr().err
    assert all(f"{given[name]} " in table and f"{intended[name] / 160:.2%}" in table for name in data.train)
