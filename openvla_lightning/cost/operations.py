"""What a training step computes and keeps, found by running it on tensors without memory."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
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
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with FakeTensorMode(), torch.device("cpu"):
        _give_fake_values(vla)
        with _Kept(vla) as kept:
            with forward:
                loss = _loss(vla.train(), text_tokens, supervised, autocast)
            with backward:
                loss.backward()
    return Cost(forward.get_total_flops(), backward.get_total_flops(), kept.activations, kept.casts)


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


def _loss(vla: VLA, text_tokens: int, supervised: int, autocast: bool) -> Tensor:
    size, towers = vla.vision_backbone.image_size, len(vla.vision_backbone.towers)
    places = torch.zeros(1, supervised, dtype=torch.long)
    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        logits = vla(
            pixel_values=torch.empty(1, 3 * towers, size, size),
            input_ids=torch.zeros(1, text_tokens, dtype=torch.long),
            places=places,
        ).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), places.flatten())


class _Kept(TorchDispatchMode):
    """Adds up what autograd keeps: copies of parameters in another dtype apart, parameters themselves not at all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.copies: dict[int, torch.UntypedStorage] = {}
        self.kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def __enter__(self) -> "_Kept":
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.hooks.__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.own:
            self.copies[result.untyped_storage()._cdata] = result.untyped_storage()
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        self.kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    @property
    def activations(self) -> int:
        """Bytes."""
        return sum(kept.nbytes() for key, kept in self.kept.items() if key not in self.own and key not in self.copies)

    @property
    def casts(self) -> int:
        """Bytes."""
        return sum(copy.nbytes() for key, copy in self.copies.items() if key in self.kept)
