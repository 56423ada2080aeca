"""What the rehearsals without a GPU play: a model of 7B widths with few blocks, every head, steps to show it."""

import copy
from collections.abc import Callable

import numpy as np
from fake_gpu import FakeGPU

from openvla_lightning.action_head import ActionHead, DiffusionHead, L1Head, TokenHead
from openvla_lightning.action_head.cogact import CogACTHead
from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.flow import FlowHead
from openvla_lightning.bench_latency import MODELS
from openvla_lightning.types import Observation, Step

WAITS = ("read", "copy", "pageable")
WIDE = copy.deepcopy(MODELS["openvla_7b"])
"""openvla-7b with three blocks of each kind."""
WIDE["vision_backbone"]["towers"] = {
    name: {"id": tower, "depth": 3} for name, tower in WIDE["vision_backbone"]["towers"].items()
}
WIDE["llm"]["architecture"]["num_hidden_layers"] = 3

MEANT = {"float64 at flow_matching.py:time_embedding", "read at fast.py:prediction"}
"""The angles of openpi's embedding are float64; what FAST ids spell is found on the host."""

HEADS: dict[str, Callable[[], ActionHead]] = {
    "tokens": TokenHead,
    "tokens_parallel": lambda: TokenHead(action_chunk=8, parallel=True),
    "fast": lambda: FastHead(action_chunk=8),
    "l1": lambda: L1Head(8, 7),
    "diffusion": lambda: DiffusionHead(8, 7),
    "flow": lambda: FlowHead(8, 7, depth=2, steps=2),
    "insulated": lambda: FlowHead(8, 7, depth=2, steps=2, insulate=True),
    "cogact": lambda: CogACTHead(16, 7, depth=2, steps=2),
}
"""Networks of few blocks that take few steps, for the same reason."""
WORDS = ["pick up the cup", "open the drawer", "push"]


def steps(head: ActionHead, count: int = 3, dataset: str = "toy") -> list[Step]:
    """As a DataModule serves them."""
    actions = np.zeros((head.action_chunk, 7), np.float32)
    return [Step(seen, actions, dataset, number=number) for number, seen in enumerate(observations(WORDS[:count]))]


def observations(words: list[str]) -> list[Observation]:
    """A picture for each instruction."""
    return [Observation({"primary": np.zeros((224, 224, 3), np.uint8)}, text) for text in words]


def not_meant(gpu: FakeGPU) -> list[str]:
    """What nobody wants to see in a step."""
    told = [f"{event.kind} at {event.where}" for event in gpu.events if event.kind in (*WAITS, "float64")]
    return [text for text in told if text not in MEANT]
