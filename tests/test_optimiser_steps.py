"""What happens once in an optimiser step happens once, and both ends of a training end it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir

from openvla_lightning.run.fit import fit

ROOT = Path(__file__).parents[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts optimiser steps, schedule steps, clippings and backward passes."""
    counted: Counter[str] = Counter()
    for owner, name in (
        (torch.optim.AdamW, "step"),
        (torch.optim.lr_scheduler.LambdaLR, "step"),
        (torch.nn.utils, "clip_grads_with_norm_"),
        (torch.nn.utils, "get_total_norm"),
        (torch.Tensor, "backward"),
    ):
        label = f"{owner.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), label, counted))
    return counted


def counting(original: Callable[..., Any], label: str, counted: Counter[str]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        counted[label] += 1
        return original(*args, **kwargs)

    return wrapper


def train(folder: Path, *overrides: str) -> L.Trainer:
    trainers: list[L.Trainer] = []
    fitted = L.Trainer.fit

    def remember(self: L.Trainer, *args: Any, **kwargs: Any) -> None:
        trainers.append(self)
        fitted(self, *args, **kwargs)

    small = ["+debug=tiny", "callbacks=none", "logger=none", "data.num_workers=0", f"paths.output_dir={folder}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", remember)
        fit(compose("train", [*small, *overrides]))  # type: ignore[arg-type]
    return trainers[0]


@pytest.mark.parametrize(("device_batch", "parts"), [("null", 1), ("1", 4)])
def test_clipping_and_schedule_step_once_per_optimiser_step(
    calls: Counter[str], tmp_path: Path, device_batch: str, parts: int
) -> None:
    trainer = train(tmp_path, "trainer.max_steps=3", f"batch_size_per_device={device_batch}")
    assert trainer.accumulate_grad_batches == parts
    assert trainer.global_step == 3
    assert calls["AdamW.step"] == calls["utils.clip_grads_with_norm_"] == calls["utils.get_total_norm"] == 3
    assert calls["LambdaLR.step"] == 3 + 1  # one when it is made
    assert calls["Tensor.backward"] == 3 * parts


def test_the_norm_that_is_looked_at_is_the_one_that_clips(calls: Counter[str], tmp_path: Path) -> None:
    few = ["callbacks=none", "+callbacks.finite._target_=openvla_lightning.callbacks.StopOnNonFinite"]
    train(tmp_path, "trainer.max_steps=3", *few)
    assert calls["utils.clip_grads_with_norm_"] == calls["utils.get_total_norm"] == 3


def test_steps_end_a_training(tmp_path: Path) -> None:
    assert train(tmp_path, "trainer.max_steps=2", "trainer.max_epochs=99").global_step == 2


@pytest.mark.parametrize("device_batch", ["null", "16"])
def test_epochs_end_a_training(tmp_path: Path, device_batch: str) -> None:
    overrides = ["trainer.max_steps=-1", "trainer.max_epochs=2", "data.global_batch_size=64", "optim=adamw_constant"]
    trainer = train(tmp_path, *overrides, f"batch_size_per_device={device_batch}", "trainer.limit_val_batches=0")
    assert trainer.global_step == 2 * (256 // 64)
    assert trainer.current_epoch == 2


def test_a_resumed_run_learns_at_the_rate_that_its_command_says(tmp_path: Path) -> None:
    first = train(tmp_path / "first", "trainer.max_steps=2", "optim.schedule=constant", "optim.warmup_ratio=0")
    first.save_checkpoint(tmp_path / "step_000002.ckpt")
    changed = ["optim.lr=1e-6", "optim.schedule=constant", "optim.warmup_ratio=0", "optim.weight_decay=0.25"]
    changed += ["optim.betas=[0.5,0.6]", "trainer.max_steps=4", f"ckpt_path={tmp_path}/step_000002.ckpt"]
    second = train(tmp_path / "second", *changed)
    assert second.global_step == 4
    matrices, vectors = second.optimizers[0].param_groups
    assert (matrices["lr"], matrices["betas"], matrices["weight_decay"]) == (1e-6, (0.5, 0.6), 0.25)
    assert (vectors["lr"], vectors["betas"], vectors["weight_decay"]) == (1e-6, (0.5, 0.6), 0.0)
