"""A dress rehearsal of the training step on a GPU, at the widths of a 7B model, on a machine without one.

Which copies, reads and dtypes are meant is said here; any other one fails. Blocks that are like their neighbours are
few, for what one does each of them does. Acting is rehearsed beside this, in `test_rehearsal_acting.py`.

What cannot be rehearsed: backward passes, since autograd asks the driver for a stream of every weight; compilation,
which needs the GPU's own compiler; QLoRA, since a weight of bitsandbytes is a tensor of a class of its own around
another tensor (`torch.Tensor._make_subclass`), which may be no fake one: its layers are tried on the CPU alone
(`model/test_quantisation.py`).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_gpu import GPU, FakeGPU, fake_gpu
from rehearsed import HEADS, WIDE, not_meant, steps
from torch import nn
from torchmetrics import MeanMetric

from openvla_lightning.action_head import ActionHead, L1Head, TokenHead
from openvla_lightning.data.augment import Augmentation
from openvla_lightning.model import VLA
from openvla_lightning.module import VLAModule
from openvla_lightning.optim import AdamW
from openvla_lightning.plugins import USUAL_HEAD, describe
from openvla_lightning.processor import Processor
from openvla_lightning.strategy import LoRA, Strategy, TrainOnly
from openvla_lightning.types import Batch

PAPER = Augmentation(
    {
        "random_resized_crop": {"scale": [0.9, 0.9], "ratio": [1.0, 1.0]},
        "random_brightness": [0.2],
        "random_contrast": [0.8, 1.2],
        "random_saturation": [0.8, 1.2],
        "random_hue": [0.05],
    }
)
STRATEGIES: dict[str, Strategy] = {
    "full": TrainOnly(["vision_backbone", "projector", "llm"]),
    "last_layer": TrainOnly(["llm.last_layer"]),
    "lora": LoRA(8, targets=["q_proj", "mlp.fc1"]),
}


def module(head: ActionHead, strategy: Strategy) -> VLAModule:
    """A model on the GPU with float32 weights, about to be trained."""
    with torch.device("meta"):
        vla = VLA.from_config({**copy.deepcopy(WIDE), "action_head": describe(head, USUAL_HEAD)})
    for part in vla.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=GPU))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(GPU)
    strategy.apply(vla)
    towers = vla.vision_backbone.towers
    made = VLAModule(lambda **_: vla, strategy, AdamW(1e-4), Processor(head, towers=towers), head)
    made.vla = vla.train()
    made.train_loss, made.train_metrics = MeanMetric(nan_strategy="disable").to(GPU), head.metrics(["toy"]).to(GPU)
    return made


def train_a_step(made: VLAModule, fault: Callable[[Batch], Batch] = lambda batch: batch) -> torch.Tensor:
    """A step, forward, from the loader's batch to the loss, as Lightning has it done."""
    batch = made.processor.collate(steps(made.action_head)).pin_memory().to(GPU, non_blocking=True)
    pixels = PAPER.views(batch.pixel_values, 7, batch.numbers, 1)
    return made.training_step(fault(replace(batch, pixel_values=pixels)), 0)


def rehearse(gpu: FakeGPU, made: VLAModule, **options: Any) -> torch.Tensor:
    """The second step, for what is kept on the device is put there in the first one."""
    # Autograd would ask the driver for a stream of every weight.
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        train_a_step(made)
        gpu.events.clear()
        return train_a_step(made, **options)


@pytest.mark.parametrize(
    ("head", "strategy"),
    [*(("tokens", name) for name in STRATEGIES), *((name, "lora") for name in HEADS if name != "tokens")],
)
def test_a_training_step_waits_for_nothing(head: str, strategy: str) -> None:
    with fake_gpu() as gpu:
        rehearse(gpu, module(HEADS[head](), STRATEGIES[strategy]))
    assert not_meant(gpu) == []
    wide = {event.where for event in gpu.events if event.kind == "float32 product"}
    assert not wide, "autocast multiplies in bfloat16"


def test_a_copy_to_the_host_in_the_step_is_noticed() -> None:
    def fault(batch: Batch) -> Batch:
        batch.pixel_values.cpu()
        return batch

    with fake_gpu() as gpu:
        rehearse(gpu, module(TokenHead(), STRATEGIES["last_layer"]), fault=fault)
    assert not_meant(gpu) == ["read at test_rehearsal.py:fault"]


def test_a_tensor_on_the_wrong_device_stops_the_rehearsal() -> None:
    def fault(batch: Batch) -> Batch:
        return replace(batch, labels=torch.zeros(batch.labels.shape, dtype=torch.long))

    with fake_gpu() as gpu:
        made = module(TokenHead(), STRATEGIES["last_layer"])
        with pytest.raises(RuntimeError, match=r"two .*devices"):
            rehearse(gpu, made, fault=fault)


def test_a_float64_is_noticed() -> None:
    with fake_gpu() as gpu:
        made = module(L1Head(8, 7), STRATEGIES["last_layer"])
        rehearse(gpu, made, fault=lambda batch: replace(batch, actions=batch.actions.double()))
    assert "float64 at test_rehearsal.py:<lambda>" in not_meant(gpu)
