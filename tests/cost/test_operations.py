"""What is counted without memory is what a real step does; at 7B it is what arithmetic says."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from openvla_lightning.action_head import DiffusionHead, L1Head, TokenHead
from openvla_lightning.action_head.base import ActionHead
from openvla_lightning.action_head.cogact import CogACTHead
from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.flow import FlowHead
from openvla_lightning.cost import operations
from openvla_lightning.cost.operations import Cost, example, step_cost
from openvla_lightning.cost.repetition import stand_ins
from openvla_lightning.model import VLA
from openvla_lightning.model.blocks import recompute_activations
from openvla_lightning.plugins import USUAL_HEAD, describe
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
    # not equal, because older versions turn the places of a batch into angles once
    assert forward.get_total_flops() == pytest.approx(3 * found.forward, rel=1e-4)
    assert backward.get_total_flops() == pytest.approx(3 * found.backward, rel=1e-4)


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


DEEP: dict[str, Callable[[VLA], Any]] = {
    "everything": TrainOnly(ALL).apply,
    "adapters of some layers": LoRA(1, targets=["*.layers.[2-6].mlp.up_proj", "mlp.fc1"]).apply,
    "the last layer": TrainOnly(["llm.last_layer"]).apply,
    "every second one recomputed": lambda vla: recompute_activations(vla, "selective"),
}


@pytest.mark.parametrize("change", DEEP.values(), ids=DEEP)
def test_blocks_that_are_left_out_are_counted(
    change: Callable[[VLA], Any], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few blocks stand for their like: every figure is the one that running all of them gives."""
    dino, siglip = config["vision_backbone"]["towers"].values()
    dino["depth"], siglip["depth"] = 6, 3
    config["llm"]["architecture"]["num_hidden_layers"] = 9
    few = counted(on_meta(config, change), autocast=True)
    monkeypatch.setattr(operations, "stand_ins", lambda signatures: {})
    assert counted(on_meta(config, change), autocast=True) == few


def test_layers_above_the_one_that_is_read_cost_nothing(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["llm"]["architecture"]["num_hidden_layers"] = 7
    head = FlowHead(2, 7, width=32, depth=1, heads=2, read_layer=5)
    few = of_head(config, head)
    monkeypatch.setattr(operations, "stand_ins", lambda signatures: {})
    assert of_head(config, head) == few


def of_head(config: dict[str, Any], head: ActionHead) -> Cost:
    with torch.device("meta"):
        vla = VLA.from_config({**copy.deepcopy(config), "action_head": describe(head, USUAL_HEAD)})
    return step_cost(vla, head, example(vla, head, prompt_tokens=4, action_dim=7), autocast=True)


@pytest.mark.parametrize(
    "head",
    [TokenHead(256, 768), FastHead(vocab_size=768, action_chunk=2), CogACTHead(2, 7, 32, 1, 2)],
    ids=lambda head: type(head).__name__,
)
def test_heads_that_are_read_after_each_other_are_counted(head: ActionHead, config: dict[str, Any]) -> None:
    before = dict(vars(head))
    cost = of_head(config, head)
    assert cost.backward > 1.5 * cost.forward > 0
    assert vars(head).keys() == before.keys()


@pytest.mark.parametrize(
    "head",
    [TokenHead(256, 768, 2, parallel=True), L1Head(2, 7), DiffusionHead(2, 7)],
    ids=lambda head: type(head).__name__,
)
def test_heads_whose_attention_goes_both_ways_are_counted(head: ActionHead, config: dict[str, Any]) -> None:
    assert of_head(config, head).backward > 1.5 * of_head(config, head).forward


def test_counting_leaves_the_model_as_it_was(config: dict[str, Any]) -> None:
    vla = on_meta(config)
    before = dict(vla.named_parameters()) | dict(vla.named_buffers())
    first = counted(vla, autocast=True)
    assert all(now is before[name] for name, now in [*vla.named_parameters(), *vla.named_buffers()])
    assert not [name for name, module in vla.named_modules() if "forward" in vars(module)]
    assert counted(vla, autocast=True) == first


@pytest.mark.parametrize(
    ("row", "skipped"),
    [
        ("AAA", {}),
        ("AAAAAA", {2: 1, 3: 1, 4: 1}),
        ("ABABABAB", {4: 2, 5: 3}),
        ("ABABABABA", {4: 2, 5: 3}),
        ("AAAAABBBBC", {2: 1, 3: 1, 7: 6}),
        ("ABCABCABCABC", {}),
    ],
)
def test_who_stands_for_whom(row: str, skipped: dict[int, int]) -> None:
    assert stand_ins(row) == skipped
