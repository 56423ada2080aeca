"""What is counted without memory is what a real step does; at 7B it is what arithmetic says."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from openvla_lightning.action_head import TokenHead
from openvla_lightning.cost.operations import Cost, example, step_cost
from openvla_lightning.model import VLA
from openvla_lightning.model.blocks import recompute_activations
from openvla_lightning.strategy import LoRA, TrainOnly
from openvla_lightning.types import Batch

HEAD = TokenHead(vocab_size=768)
ALL = ["vision_backbone", "projector", "llm"]


def on_meta(config: dict[str, Any], change: Callable[[VLA], Any] = lambda vla: None) -> VLA:
    with torch.device("meta"):
        vla = VLA.from_config(copy.deepcopy(config))
        change(vla)
    return vla


def sample(vla: VLA) -> Batch:
    """Twelve ids, the last eight of them learnt."""
    return example(vla, HEAD, prompt_tokens=4, action_dim=7)


def counted(vla: VLA, autocast: bool) -> Cost:
    return step_cost(vla, HEAD, sample(vla), autocast)


def test_a_real_step_computes_what_was_counted(vla: VLA) -> None:
    found = step_cost(on_meta(vla.config), HEAD, sample(vla), autocast=False)
    places = torch.zeros(3, 8, dtype=torch.long)
    real = copy.deepcopy(vla).train()
    with FlopCounterMode(display=False) as forward:
        logits = real(
            pixel_values=torch.zeros(3, 6, 56, 56), input_ids=torch.ones(3, 12, dtype=torch.long), places=places
        ).logits
    with FlopCounterMode(display=False) as backward:
        nn.functional.cross_entropy(logits.flatten(0, 1), places.flatten()).backward()
    assert forward.get_total_flops() == 3 * found.forward
    assert backward.get_total_flops() == 3 * found.backward


def test_operations_follow_from_what_learns(config: dict[str, Any]) -> None:
    def cost(change: Callable[[VLA], Any]) -> Cost:
        return counted(on_meta(config, change), autocast=True)

    everything, adapters = cost(TrainOnly(ALL).apply), cost(LoRA(1).apply)
    last = cost(TrainOnly(["llm.last_layer"]).apply)
    assert everything.backward == pytest.approx(2 * everything.forward, rel=0.15), "pixels need no gradient"
    assert adapters.backward == pytest.approx(adapters.forward, rel=0.25), "frozen weights need no gradient"
    assert last.backward < 0.5 * adapters.backward, "nothing flows back below what learns"
    assert last.forward == everything.forward
    again = cost(lambda vla: recompute_activations(vla, "full"))
    assert 0.3 < (again.backward - everything.backward) / everything.forward < 1, "blocks are computed twice"
    assert again.activations < 0.7 * everything.activations


def test_weights_cast_for_computing_are_apart_from_activations(config: dict[str, Any]) -> None:
    matrices = [p for name, p in on_meta(config).named_parameters() if p.ndim > 1 and "embed" not in name]
    cast = counted(on_meta(config), autocast=True).casts
    assert cast == pytest.approx(2 * sum(p.numel() for p in matrices), rel=0.2)
    assert counted(on_meta(config), autocast=False).casts == 0
