"""A real Trainer over a model that has collapsed, or not: who is warned of what."""

import logging
from typing import Any

import lightning as L
import pytest
import torch
from quiet import QUIET
from torch.utils.data import DataLoader

from openvla_lightning.callbacks import CollapseWarning
from openvla_lightning.types import Batch, Prediction


def batch(size: int = 8) -> Batch:
    ids = torch.zeros(size, 2, dtype=torch.long)
    return Batch(
        pixel_values=torch.zeros(size, 3, 2, 2),
        input_ids=ids,
        attention_mask=ids == 0,
        places=ids[:, :0],
        labels=ids,
        actions=torch.rand(size, 1, 3, generator=torch.Generator().manual_seed(0)),
    )


class Model(L.LightningModule):
    """Predicts what was demonstrated, or always the same; reports the accuracies it is given."""

    def __init__(self, constant: bool, accuracies: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.constant, self.accuracies = constant, iter(accuracies)

    def forward(self, batch: Batch) -> Any:
        actions = torch.zeros_like(batch.actions) if self.constant else batch.actions
        return self.weight.sum(), Prediction(actions=actions, targets=batch.actions)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("val/action_accuracy", next(self.accuracies))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(constant: bool, accuracies: list[float], tmp_path: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=2 * len(accuracies),
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **QUIET,
        default_root_dir=tmp_path,
        callbacks=[CollapseWarning(patience=3)],
    )
    loader = DataLoader([batch()] * 4, batch_size=None)
    trainer.fit(Model(constant, accuracies), loader, loader)
    return trainer


def test_one_action_for_everything_is_said(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = run(True, [0.1, 0.9], tmp_path)
    assert "same action is predicted for all of 8 held-out images, 8 different" in caplog.text
    assert trainer.callback_metrics["val/distinct_actions"] == 1 / 8


def test_varied_actions_and_a_rising_accuracy_are_not(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = run(False, [0.1, 0.1, 0.1, 0.15, 0.15, 0.2], tmp_path)
    assert "action" not in caplog.text
    assert trainer.callback_metrics["val/distinct_actions"] == 1


@pytest.mark.parametrize(("accuracies", "stuck"), [([0.1, 0.2, 0.2, 0.19, 0.205], True), ([0.1] + [0.96] * 6, False)])
def test_an_accuracy_that_stands_still_low_is_said_once(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, accuracies: list[float], stuck: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        run(False, [*accuracies, accuracies[-1]], tmp_path)
    assert caplog.text.count("has not risen above") == stuck


def test_a_resumed_run_goes_on_counting(tmp_path: Any) -> None:
    trainer = run(False, [0.2, 0.1, 0.15], tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = CollapseWarning()
    resumed.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][resumed.state_key])
    assert (resumed.best, resumed.waited) == (pytest.approx(0.2), 2)
