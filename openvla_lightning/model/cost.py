"""What a training step computes and keeps, found by running it on tensors without memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from openvla_lightning.model.vla import VLA


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one sample, and what comes once per step.

    Attributes:
        forward, backward: floating-point operations; `backward` holds what is computed again there.
        activations: bytes that the forward pass keeps for the backward pass.
        casts: bytes of weights in the dtype of computation, where that is not their own; once per step.
    """

    forward: float
    backward: float
    activations: float
    casts: float


def step_cost(vla: VLA, text_tokens: int, supervised: int, autocast: bool) -> Cost:
    """Count a training step of `vla`, which must be on the meta device; it is not usable afterwards.

    Takes seconds for a model of 7B, and no memory: operations run on shapes alone.

    Args:
        vla: what learns is chosen, what is to be recomputed too (`recompute_activations`).
        text_tokens: L, ids in a row.
        supervised: K, positions with logits.
        autocast: compute in bfloat16 over weights of any dtype; otherwise in the weights' own.
    """
    with FakeTensorMode(), torch.device("cpu"):
        _give_fake_values(vla)
        one, two = (_count(vla.train(), batch, text_tokens, supervised, autocast) for batch in (1, 2))
    return Cost(one[0], one[1], two[2] - one[2], 2 * one[2] - two[2])


def _give_fake_values(vla: nn.Module) -> None:
    """Parameters and buffers on a CPU that has no memory for them; tied ones stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in vla.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = None if old is None else made[old]  # type: ignore[assignment]


def _count(vla: VLA, batch: int, text_tokens: int, supervised: int, autocast: bool) -> tuple[int, int, int]:
    """Operations forward and backward, bytes kept, of a whole batch."""
    size, towers = vla.vision_backbone.image_size, len(vla.vision_backbone.towers)
    pixels = torch.empty(batch, 3 * towers, size, size)
    ids = torch.zeros(batch, text_tokens, dtype=torch.long)
    places = torch.zeros(batch, supervised, dtype=torch.long)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    vla.zero_grad()
    with _kept_bytes(vla) as kept:
        with forward, context:
            logits = vla(pixel_values=pixels, input_ids=ids, places=places).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), places.flatten())
        with backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops(), sum(kept.values())


@contextmanager
def _kept_bytes(model: nn.Module) -> Iterator[dict[Any, int]]:
    """Collects what autograd keeps inside: storage -> bytes, without the parameters of `model`."""
    kept: dict[Any, int] = {}
    alive = []  # an address is of one storage only as long as that lives
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept
