"""A dress rehearsal of training and acting on a GPU, at the widths of a 7B model, on a machine without one.

Which copies, reads and dtypes are meant is said here; any other one fails. Blocks that are like their neighbours are
few, for what one does each of them does.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import GPU, FakeGPU, fake_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError
from torchmetrics import MeanMetric

from openvla_lightning.action_head import ActionHead, DiffusionHead, L1Head, TokenHead
from openvla_lightning.action_head.cogact import CogACTHead
from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.flow import FlowHead
from openvla_lightning.bench_latency import MODELS, random_policy
from openvla_lightning.data.augment import Augmentation
from openvla_lightning.model import VLA
from openvla_lightning.module import VLAModule
from openvla_lightning.optim import AdamW
from openvla_lightning.plugins import USUAL_HEAD, describe
from openvla_lightning.processor import Processor
from openvla_lightning.strategy import LoRA, Strategy, TrainOnly
from openvla_lightning.types import Batch, Observation, Step

WAITS = ("read", "copy", "pageable")
PAPER = Augmentation(
    {
        "random_resized_crop": {"scale": [0.9, 0.9], "ratio": [1.0, 1.0]},
        "random_brightness": [0.2],
        "random_contrast": [0.8, 1.2],
        "random_saturation": [0.8, 1.2],
        "random_hue": [0.05],
    }
)
WIDE = copy.deepcopy(MODELS["openvla_7b"])
"""openvla-7b with three blocks of each kind."""
WIDE["vision_backbone"]["towers"] = {
    name: {"id": tower, "depth": 3} for name, tower in WIDE["vision_backbone"]["towers"].items()
}
WIDE["llm"]["architecture"]["num_hidden_layers"] = 3

MEANT = {"float64 at flow_matching.py:time_embedding", "read at fast.py:prediction"}
"""The angles of openpi's embedding are float64; what FAST ids spell is found on the host."""

STRATEGIES: dict[str, Strategy] = {
    "full": TrainOnly(["vision_backbone", "projector", "llm"]),
    "last_layer": TrainOnly(["llm.last_layer"]),
    "lora": LoRA(8, targets=["q_proj", "mlp.fc1"]),
}
HEADS: dict[str, Callable[[], ActionHead]] = {
    "tokens": TokenHead,
    "tokens_parallel": lambda: TokenHead(action_chunk=8, parallel=True),
    "fast": lambda: FastHead(action_chunk=8),
    "l1": lambda: L1Head(8, 7),
    "diffusion": lambda: DiffusionHead(8, 7),
    "flow": lambda: FlowHead(8, 7),
    "insulated": lambda: FlowHead(8, 7, insulate=True),
    "cogact": lambda: CogACTHead(16, 7),
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


def steps(head: ActionHead, count: int = 3) -> list[Step]:
    """As a DataModule serves them."""
    picture = np.zeros((224, 224, 3), np.uint8)
    actions = np.zeros((head.action_chunk, 7), np.float32)
    words = ["pick up the cup", "open the drawer", "push"]
    return [Step(Observation({"primary": picture}, words[n]), actions, "toy", number=n) for n in range(count)]


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


def not_meant(gpu: FakeGPU) -> list[str]:
    """What nobody wants to see in a step."""
    told = [f"{event.kind} at {event.where}" for event in gpu.events if event.kind in (*WAITS, "float64")]
    return [text for text in told if text not in MEANT]


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


@pytest.mark.parametrize("head", ["l1", "tokens_parallel"])
def test_a_chunk_is_made_by_graphs_and_read_once(head: str) -> None:
    seen = Observation({"primary": np.zeros((224, 224, 3), np.uint8)}, "pick up the cup")
    with fake_gpu() as gpu:
        policy = random_policy(copy.deepcopy(WIDE), torch.device("cuda"), torch.bfloat16, None, HEADS[head]())
        policy.act_chunk([seen])
        captured, replayed = len(gpu.captures), gpu.replays
        gpu.events.clear()
        policy.act_chunk([seen])
    assert captured
    assert len(gpu.captures) == captured, "what was captured once is replayed"
    assert gpu.replays > replayed
    assert len(gpu.where("read")) == 1, "the actions"
    assert gpu.where("copy", "float64", "float32 product") == []


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
        with pytest.raises(FakeTensorDeviceMismatchError):
            rehearse(gpu, made, fault=fault)


def test_a_float64_is_noticed() -> None:
    with fake_gpu() as gpu:
        made = module(L1Head(8, 7), STRATEGIES["last_layer"])
        rehearse(gpu, made, fault=lambda batch: replace(batch, actions=batch.actions.double()))
    assert "float64 at test_rehearsal.py:<lambda>" in not_meant(gpu)
