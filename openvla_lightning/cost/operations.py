"""Operations and activations of a training step, found by running it on tensors without memory."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from openvla_lightning.action_head import ActionHead
from openvla_lightning.cost.repetition import shortened, signature, stand_ins
from openvla_lightning.model.blocks import blocks
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import Batch


@dataclass(frozen=True, slots=True)
class Cost:
    """Costs of one sample, and costs that occur once per step.

    Attributes:
        forward, backward: floating-point operations; `backward` includes recomputation.
        activations: bytes that the forward pass keeps for the backward pass.
        casts: bytes of weights that are cast to the dtype of computation; once per step.
    """

    forward: float
    backward: float
    activations: float
    casts: float


def example(vla: VLA, head: ActionHead, prompt_tokens: int, action_dim: int, views: int = 1) -> Batch:
    """A batch of one sample with the shapes of training; its values have no meaning.

    Args:
        vla: defines images and proprioception.
        head: writes the ids after the prompt.
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
        dataset_names=["example"],
        numbers=[0],
    )


def step_cost(vla: VLA, head: ActionHead, batch: Batch, autocast: bool) -> Cost:
    """Count a training step of `vla`, which must be on the meta device and is set to training mode.

    This takes seconds for a 7B model, and no memory: operations run on shapes only, and only a few of equal blocks
    are run (`cost.repetition`).

    Args:
        vla: the model, after its strategy and `recompute_activations` were applied.
        head: the action head with the loss.
        batch: one sample, with normalised pixels; only its shapes count (see `example`).
        autocast: compute in bfloat16 with weights of any dtype; otherwise in the weights' dtype.
    """
    head = copy.deepcopy(head)  # otherwise its tensors on a device would be replaced by ones without values
    if hasattr(head, "prediction"):  # beside the loss; FAST spells it on the host, from values, which there are none of
        head.prediction = lambda *_: None
    row = blocks(vla.train())
    skipped = stand_ins([signature(block) for block in row])
    asleep = {module for number in skipped for module in row[number].modules()}
    # Heads have constants outside the model, such as the centres of bins, and these may be real tensors.
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _fake_values(vla, asleep),
        _Ledger(vla) as ledger,
        shortened(row, skipped, ledger) as stood_for,
    ):
        loss = _loss(vla, head, batch, autocast)
        ledger.flops = ledger.backward
        loss.backward()
    return ledger.cost({number: 1 + times for number, times in stood_for.items()})


@contextmanager
def _fake_values(vla: nn.Module, asleep: Collection[nn.Module]) -> Iterator[None]:
    """Inside this context, parameters and buffers are fake CPU tensors without memory, except in modules that do not
    run; tied ones stay tied. Afterwards they are restored."""
    made: dict[Tensor, Tensor] = {}
    before: list[tuple[Any, str, Tensor | None]] = []
    for module in vla.modules():
        if module in asleep:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                before.append((tensors, name, old))
                if old is not None and old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = None if old is None else made[old]  # type: ignore[assignment]
    try:
        yield
    finally:
        for tensors, name, old in before:
            tensors[name] = old


def _loss(vla: VLA, head: ActionHead, batch: Batch, autocast: bool) -> Tensor:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    made: dict[str, Any] = {
        name: torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    }
    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        return head.loss(vla, replace(batch, **made))[0]


class _Ledger(TorchDispatchMode):
    """Sums operations and the tensors that autograd keeps, per block.

    Copies of parameters in another dtype are counted separately; parameters themselves do not count.

    Attributes:
        block: the block that is being computed (see `repetition.Watched`).
        flops: block -> operations, for the running pass: `forward` or `backward`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.block: int | None = None
        self.forward: Counter[int | None] = Counter()
        self.backward: Counter[int | None] = Counter()
        self.flops = self.forward
        self.weight_storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        # storages are kept alive, so that no address is reused
        self.copies: dict[int, torch.UntypedStorage] = {}
        self.kept: dict[int, tuple[torch.UntypedStorage, int | None]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def __enter__(self) -> "_Ledger":
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.hooks.__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.flops[self.block] += count(*args, **kwargs, out_val=result)
        elif function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weight_storages:
            self.copies[result.untyped_storage()._cdata] = result.untyped_storage()
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.kept:
            self.kept[storage._cdata] = storage, self.block
        return tensor

    def cost(self, weights: Mapping[int, int]) -> Cost:
        """The total, where each block counts as often as `weights` says, or once."""

        def total(counted: Mapping[int | None, float]) -> float:
            return sum(value * (1 if block is None else weights.get(block, 1)) for block, value in counted.items())

        activations: Counter[int | None] = Counter()
        casts: Counter[int | None] = Counter()
        for key, (storage, block) in self.kept.items():
            if key not in self.weight_storages:
                (casts if key in self.copies else activations)[block] += storage.nbytes()
        return Cost(total(self.forward), total(self.backward), total(activations), total(casts))
