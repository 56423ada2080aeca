"""A real Trainer: what is logged about its speed adds up."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from quiet import QUIET
from tiny_parts import LLAMA, TOWERS
from torch import Tensor
from torch.utils.data import DataLoader

from openvla_lightning.action_head import TokenHead
from openvla_lightning.callbacks import Throughput
from openvla_lightning.callbacks.throughput import PHASES
from openvla_lightning.model import VLA
from openvla_lightning.module import VLAModule
from openvla_lightning.processor import Processor
from openvla_lightning.strategy import TrainOnly
from openvla_lightning.types import IGNORE_INDEX, Batch, learnt_places

WAIT = 0.02
TINY = {
    "vision_backbone": {"towers": TOWERS, "image_size": 32},
    "projector": {"kind": "linear"},
    "llm": {"name": "tiny", "architecture": LLAMA, "vocab_size": 768},
}


def batch(size: int = 4) -> Batch:
    ids = torch.randint(300, 700, (size, 12))
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    mask = torch.ones(size, 12, dtype=torch.bool)
    return Batch(
        pixel_values=torch.zeros(size, 3, 32, 32, dtype=torch.uint8),
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        places=learnt_places(labels),
        actions=torch.zeros(size, 1, 7),
    )


class Slow(L.LightningModule):
    """Forward, backward and optimiser take a known time."""

    configure_gradient_clipping, gradient_norm = VLAModule.configure_gradient_clipping, None

    def __init__(self) -> None:
        super().__init__()
        self.strategy = TrainOnly(["vision_backbone", "projector", "llm"])
        self.action_head = TokenHead(vocab_size=768)
        self.processor = Processor(self.action_head, image_size=32, towers=TOWERS)
        self.vla = VLA.from_config(TINY)
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        time.sleep(WAIT)
        return self.action_head.loss(self.vla, self.processor.normalise(batch))[0]

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        time.sleep(2 * WAIT)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        time.sleep(3 * WAIT)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        if name == "train/samples_per_second":
            self.logged.append({})
        self.logged[-1][name.removeprefix("train/")] = float(value)


class Batches(torch.utils.data.Dataset[Batch]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Batch:
        time.sleep(WAIT)
        return batch()


def run(tmp_path: Path, callback: Throughput, **options: Any) -> list[dict[str, float]]:
    module = Slow()
    trainer = L.Trainer(
        max_steps=6,
        log_every_n_steps=2,
        **QUIET,
        default_root_dir=tmp_path,
        callbacks=[callback],
        precision="bf16-mixed",
        gradient_clip_val=1.0,  # which Lightning refuses for a fused optimiser like this one
        **options,
    )
    trainer.fit(module, DataLoader(Batches(), batch_size=None))
    return module.logged


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_parts_of_a_step_are_told_apart_and_add_up(tmp_path: Path, accumulated: int) -> None:
    logged = run(tmp_path, Throughput(), accumulate_grad_batches=accumulated)
    assert len(logged) == 3, "once per window, also when several batches make a step"
    for values in logged[1:]:
        parts = {phase: values[f"step_seconds/{phase}"] for phase in PHASES}
        assert sum(parts.values()) == pytest.approx(values["step_seconds"], rel=0.1)
        for phase, least in zip(PHASES, (accumulated, accumulated, 2 * accumulated, 3), strict=True):
            assert parts[phase] >= 0.9 * least * WAIT
        assert values["samples_per_second"] * values["step_seconds"] == pytest.approx(4 * accumulated)
        assert values["data_wait"] == pytest.approx(parts["data"] / values["step_seconds"])
        assert "mfu" not in values, "the peak of this device is not known"


def test_utilisation_is_operations_over_the_peak(tmp_path: Path) -> None:
    callback = Throughput(peak_tflops=0.5)
    last = run(tmp_path, callback)[-1]
    assert callback.flops_per_sample is not None
    # two towers' worth of small things aside, six operations per parameter and token
    decoder = sum(p.numel() for p in Slow().vla.llm.model.layers.parameters())
    assert 6 * decoder * 13 < callback.flops_per_sample < 60 * decoder * 13
    assert last["mfu"] == pytest.approx(last["samples_per_second"] * callback.flops_per_sample / 0.5e12)
