"""Gradients that are no numbers never reach the weights, and the samples behind them are named."""

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from quiet import QUIET
from torch import Tensor

from openvla_lightning.callbacks import NonFiniteError, StopOnNonFinite
from openvla_lightning.data import VLADataModule
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.types import Batch, Step

BAD = 21


def collate(steps: list[Step]) -> Batch:
    size = len(steps)
    ids = torch.zeros(size, 2, dtype=torch.int64)
    numbers, names = [step.number for step in steps], [step.dataset_name for step in steps]
    return Batch(
        pixel_values=torch.zeros(size, 3, 2, 2),
        input_ids=ids,
        attention_mask=ids > 0,
        places=ids[:, :0],
        labels=ids,
        actions=torch.zeros(size, 1, 7),
        dataset_names=names,
        numbers=numbers,
    )


class Model(L.LightningModule):
    """Its loss is not a number for one sample; or its gradient alone is not."""

    def __init__(self, fused: bool, backward_only: bool = False) -> None:
        super().__init__()
        self.weight, self.fused, self.backward_only = torch.nn.Parameter(torch.ones(3)), fused, backward_only

    def forward(self, batch: Batch) -> tuple[Tensor, None]:
        bad = torch.tensor([number == BAD for number in batch.numbers])
        if self.backward_only:  # the root of nothing is nothing, its slope is infinite
            return (self.weight.sum() * torch.where(bad, 0.0, 1.0)).abs().sqrt().mean(), None
        return (self.weight.sum() * torch.where(bad, torch.nan, 1.0)).mean(), None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.1, fused=self.fused)


def fit(model: Model, **trainer: Any) -> L.Trainer:
    data = VLADataModule(
        partial(Synthetic, num_steps=64, image_size=8),
        mix={"kuka": 1.0},
        collate=collate,  # type: ignore[arg-type]
        image_size=8,
        global_batch_size=8,
        num_workers=0,
        limit_val_samples=0,
    )
    made = L.Trainer(
        max_epochs=-1,
        **QUIET,
        limit_val_batches=0,
        callbacks=[StopOnNonFinite()],
        **{"max_steps": 6, **trainer},
    )
    made.fit(model, data)
    return made


def weights_after(steps: int, **trainer: Any) -> Tensor:
    model = Model(fused=False)
    fit(model, max_steps=steps, **trainer)
    return model.weight.detach()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_the_step_is_not_taken_and_the_sample_named(fused: bool, accumulated: int) -> None:
    model = Model(fused)
    options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 1.0}
    with pytest.raises(NonFiniteError, match=r"step 2: .*\n.*kuka, trajectory \d, step \d+\n") as error:
        fit(model, **options)
    assert "1 of 8 samples" in str(error.value)
    assert torch.isfinite(model.weight).all()
    expected = weights_after(2, **options)
    if not fused:
        torch.testing.assert_close(model.weight.detach(), expected)


def test_the_last_step_of_a_fused_optimiser_is_looked_at_too() -> None:
    model = Model(fused=True)
    with pytest.raises(NonFiniteError, match="step 2"):
        fit(model, max_steps=3)
    torch.testing.assert_close(model.weight.detach(), weights_after(2))


def test_an_overflow_of_the_backward_pass_blames_no_sample() -> None:
    with pytest.raises(NonFiniteError, match="none of the samples"):
        fit(Model(fused=False, backward_only=True))


def test_finite_training_is_left_alone() -> None:
    assert fit(Model(fused=False), max_steps=2).global_step == 2
