"""Recomputing and compiling change how gradients are found, not which."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from openvla_lightning.model import VLA
from openvla_lightning.model.blocks import Recompute, blocks, compile_blocks, recompute_activations
from openvla_lightning.strategy import LoRA, Strategy, TrainOnly

ALL = ["vision_backbone", "projector", "llm"]


def gradients(vla: VLA, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    places = torch.arange(3).expand(3, 3)
    loss = vla(
        pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], places=places, labels=batch["input_ids"]
    ).loss
    loss.backward()
    return loss, {name: p.grad for name, p in vla.named_parameters() if p.grad is not None}


def check_gradients(vla: VLA, batch: dict[str, Tensor], strategy: Strategy, change: Callable[[VLA], None]) -> None:
    plain = copy.deepcopy(vla).train()
    strategy.apply(plain)
    changed = copy.deepcopy(plain)
    change(changed)
    assert list(changed.state_dict()) == list(plain.state_dict()), "names stay"
    (loss, expected), (again, found) = gradients(plain, batch), gradients(changed, batch)
    torch.testing.assert_close(again, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", [TrainOnly(ALL), TrainOnly(["llm.last_layer"]), LoRA(4)])
@pytest.mark.parametrize("which", ["selective", "full"])
def test_recomputing_changes_no_gradient(
    vla: VLA, batch: dict[str, Tensor], strategy: Strategy, which: Recompute
) -> None:
    check_gradients(vla, batch, strategy, lambda changed: recompute_activations(changed, which))


def test_compiling_changes_no_gradient_with_adapters_and_recomputing(vla: VLA, batch: dict[str, Tensor]) -> None:
    def change(changed: VLA) -> None:
        compile_blocks(changed, backend="eager")
        recompute_activations(changed, "full")

    check_gradients(vla, batch, LoRA(4), change)


def kept(vla: VLA, batch: dict[str, Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vla(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])
    return sum(sizes.values())


def test_each_choice_keeps_less(config: dict[str, Any], build: Callable[..., VLA], batch: dict[str, Tensor]) -> None:
    memory = []
    for which in ("none", "selective", "full"):
        vla = build(config).train()
        recompute_activations(vla, which)
        memory.append(kept(vla, batch))
    assert memory[0] > memory[1] > memory[2]


def test_blocks_are_those_of_towers_and_decoder(vla: VLA) -> None:
    assert len(blocks(vla)) == 3 + 2 + 2


def test_an_unknown_choice_lists_the_known_ones(vla: VLA) -> None:
    with pytest.raises(ValueError, match="none, selective, full"):
        recompute_activations(vla, "some")  # type: ignore[arg-type]
