"""Weights in 8 or 4 bits, by bitsandbytes: to act with less memory, or to train adapters on top (QLoRA)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from openvla_lightning.model.vla import VLA

KINDS = ("nf4", "fp4")
_BLOCK = 64  # 4-bit numbers that share a scale


class Quantisation:
    """Replaces linear layers by their quantised likes; what they compute in stays the dtype they had.

    A quantised model is placed for good: moving or casting it as a whole is left to nobody.

    On a CPU, layers whose inputs are no multiple of 64 wide stay as they are at 4 bits.

    Args:
        bits: 8 (LLM.int8()) or 4.
        kind: of 4-bit numbers: `nf4`, the quantiles of a normal distribution, as QLoRA; or `fp4`.
        double: also quantise the 4-bit blocks' scales.
        keep: parts (see `VLA.part`) whose layers stay as they are.
        threshold: of 8 bits: inputs beyond it are multiplied unquantised.

    Raises:
        ValueError: for other bits or kinds.
    """

    def __init__(
        self,
        bits: int,
        kind: str = "nf4",
        double: bool = True,
        keep: Sequence[str] = ("vision_backbone", "llm.lm_head"),
        threshold: float = 6.0,
    ) -> None:
        if bits not in (4, 8):
            raise ValueError(f"quantisation to {bits} bits is not known; choose 4 or 8")
        if kind not in KINDS:
            raise ValueError(f"4-bit numbers of kind {kind!r} are not known; choose {' or '.join(KINDS)}")
        self.bits, self.kind, self.double, self.threshold = bits, kind, double, threshold
        self.keep = list(keep)

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {
            "bits": self.bits,
            "kind": self.kind,
            "double": self.double,
            "keep": self.keep,
            "threshold": self.threshold,
        }

    def __call__(self, vla: VLA, device: torch.device | str = "cpu") -> VLA:
        """Quantise `vla` in place, layer by layer, and put all of it on `device`.

        Adapters stay as they are; layers under them are quantised.

        Raises:
            KeyError: for a part the model does not have, naming those it has.
            ValueError: when the model was quantised before, or nothing is left to quantise.
        """
        if vla.quantisation is not None:
            raise ValueError(f"the model is quantised already: {vla.quantisation}")
        names = list(self._layers(vla, torch.device(device)))
        if not names:
            raise ValueError(f"nothing to quantise: keep={self.keep} leaves no linear layer of a width that can be")
        for name in names:
            parent, _, child = name.rpartition(".")
            owner = vla.get_submodule(parent)
            setattr(owner, child, self._quantised(getattr(owner, child), torch.device(device)))
        for parameter in vla.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(device)
        for module in vla.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)
        vla.quantisation = self.config
        setattr(vla, f"is_loaded_in_{self.bits}bit", True)  # what peft looks at
        return vla

    def _layers(self, vla: VLA, device: torch.device) -> Iterator[str]:
        kept = {module for part in self.keep for top in vla.part(part) for module in top.modules()}
        # bitsandbytes 0.50 reads other widths wrongly on a CPU; of the 7B models only SigLIP's `fc2` has one
        divisor = _BLOCK if self.bits == 4 and device.type == "cpu" else 1
        for name, module in vla.named_modules():
            free = isinstance(module, nn.Linear) and module not in kept and ".lora_" not in name
            if free and module.in_features % divisor == 0:
                yield name

    def _quantised(self, linear: nn.Linear, device: torch.device) -> nn.Module:
        import bitsandbytes as bnb  # slow to import, and of no use without quantisation

        size: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
        weight = linear.weight.data.cpu()
        layer: Any
        if self.bits == 4:
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=weight.dtype, **size)
            # In `eval` it would repack weights in place, for some widths wrongly, and training could not go on.
            layer.support_avx512bf16_for_cpu = False
            numbers: Any = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=self.double, quant_type=self.kind, module=layer
            )
        else:
            layer = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, has_fp16_weights=False, threshold=self.threshold, **size
            )
            numbers = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.weight = numbers.to(device)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
        return layer.train(linear.training)


def plain_state(vla: VLA, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state`, a `state_dict` of a quantised model, with the numbers that its quantised weights stand for."""
    layers = {name: module for name, module in vla.named_modules() if is_quantised(module)}
    weights = {f"{name}.weight": dequantised(layer) for name, layer in layers.items()}
    # beside a weight lie the scales of its blocks or rows: `weight.absmax`, `SCB`, ...
    scales = {key for key in state for name in layers if key.startswith((f"{name}.weight", f"{name}.SCB"))}
    return {key: weights.get(key, value) for key, value in state.items() if key in weights or key not in scales}


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of 4 or 8 bits."""
    return isinstance(module, nn.Linear) and not module.weight.dtype.is_floating_point


def dequantised(layer: nn.Module) -> torch.Tensor:
    """The weight, float32, that a quantised layer stands for."""
    import bitsandbytes as bnb

    weight: Any = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    state: Any = layer.state
    scales = state.SCB if weight.SCB is None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales).float()
