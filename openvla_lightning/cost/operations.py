"""What a training step computes and keeps, found by running it on tensors without memory."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from openvla_lightning.action_head import ActionHead
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import Batch


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


def example(vla: VLA, head: ActionHead, prompt_tokens: int, action_dim: int, views: int = 1) -> Batch:
    """A batch of one sample as training would make it; its values mean nothing.

    Args:
        vla: whose images and proprioception.
        head: what is written after the prompt.
        prompt_tokens: ids of BOS and prompt.
        action_dim: D.
        views: V.
    """
    actions = torch.zeros(1, head.action_chunk, action_dim, device="cpu")
    (written,) = head.write(actions, 1, action_dim, 0)
    length, size = prompt_tokens + len(written), vla.vision_backbone.image_size
    return Batch(
        pixel_values=torch.zeros(1, 3 * views * len(vla.vision_backbone.towers), size, size, device="cpu"),
        input_ids=torch.zeros(1, length, dtype=torch.long, device="cpu"),
        attention_mask=torch.ones(1, length, dtype=torch.bool, device="cpu"),
        places=torch.arange(prompt_tokens - 1, length - 1, device="cpu")[None],
        proprio=None if vla.proprio_dim is None else torch.zeros(1, vla.proprio_dim, device="cpu"),
        labels=torch.zeros(1, length, dtype=torch.long, device="cpu"),
        actions=actions,
    )


def step_cost(vla: VLA, head: ActionHead, batch: Batch, autocast: bool) -> Cost:
    """Count a training step of `vla`, which must be on the meta device; it is not usable afterwards.

    Takes seconds for a model of 7B, and no memory: operations run on shapes alone.

    Args:
        vla: what learns is chosen, what is to be recomputed too (`recompute_activations`).
        head: whose loss.
        batch: one sample, with normalised pixels; only its shapes count (see `example`).
        autocast: compute in bfloat16 over weights of any dtype; otherwise in the weights' own.
    """
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    head = copy.deepcopy(head)  # what it keeps on a device would be replaced by tensors without values
    # Heads hold constants, such as the centres of bins, that are no part of the model: they may be real.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        _give_fake_values(vla)
        with _Kept(vla) as kept:
            with forward:
                loss = _loss(vla.train(), head, batch, autocast)
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


def _loss(vla: VLA, head: ActionHead, batch: Batch, autocast: bool) -> Tensor:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    made: dict[str, Any] = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in tensors.items() if isinstance(v, Tensor)}
    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        return head.loss(vla, replace(batch, **made))[0]


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
