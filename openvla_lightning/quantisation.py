"""Weights in 8 or 4 bits: bitsandbytes to train adapters on top (QLoRA), torchao to act faster."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import nn

from openvla_lightning.model.vla import VLA
from openvla_lightning.runtime.extras import install

KINDS = ("nf4", "fp4")
_BLOCK = 64  # 4-bit numbers that share a scale
KEEP = ("vision_backbone", "llm.lm_head")
"""Parts that are not quantised by default: they hold few of the weights and matter most for accuracy."""


class Quantiser(Protocol):
    """A way to quantise a model."""

    trains: bool
    """Whether adapters can learn on top."""
    keep: list[str]
    """Parts (see `VLA.part`) that are not quantised."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError if this machine does not support it, saying what is missing."""

    def __call__(self, vla: VLA, device: torch.device | str = "cpu") -> VLA:
        """Quantise `vla` in place, and put all of it on `device`."""


class Quantisation:
    """Replaces linear layers by quantised ones, which compute in the same dtype as before.

    Do not move or cast a quantised model: it stays on its device in its dtype.

    On a CPU, `bits=4` skips layers whose input width is no multiple of 64.

    Args:
        bits: 8 (LLM.int8()) or 4.
        kind: kind of the 4-bit numbers: `nf4`, the quantiles of a normal distribution, as in QLoRA; or `fp4`.
        double: also quantise the 4-bit blocks' scales.
        keep: parts (see `VLA.part`) whose layers are not quantised.
        threshold: for 8 bits: inputs above it are multiplied unquantised.

    Raises:
        ValueError: for other bits or kinds.
    """

    trains = True

    def __init__(
        self,
        bits: int,
        kind: str = "nf4",
        double: bool = True,
        keep: Sequence[str] = KEEP,
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

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """As the protocol says."""
        if find_spec("bitsandbytes") is None:
            raise ValueError(f"quantisation=int{self.bits} needs bitsandbytes: pip install bitsandbytes")

    def __call__(self, vla: VLA, device: torch.device | str = "cpu") -> VLA:
        """Quantise `vla` in place, layer by layer, and put all of it on `device`.

        Adapters are not quantised; the layers under them are.

        Raises:
            KeyError: the model has no such part; the message names its parts.
            ValueError: when the model was quantised before, or nothing is left to quantise.
        """
        names = quantised_names(vla, self.keep, self._divisor(torch.device(device)))
        for name in names:
            parent, _, child = name.rpartition(".")
            owner = vla.get_submodule(parent)
            setattr(owner, child, self._quantised(getattr(owner, child), torch.device(device)))
        _place_others(vla, names, device)
        vla.quantisation = self.config
        setattr(vla, f"is_loaded_in_{self.bits}bit", True)  # peft reads this attribute
        return vla

    def _divisor(self, device: torch.device) -> int:
        # bitsandbytes 0.50 reads other widths wrongly on a CPU; in the 7B models, only SigLIP's `fc2` has one
        return _BLOCK if self.bits == 4 and device.type == "cpu" else 1

    def _quantised(self, linear: nn.Linear, device: torch.device) -> nn.Module:
        import bitsandbytes as bnb  # slow to import, and needed only here

        size: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
        weight = linear.weight.data.cpu()
        layer: Any
        if self.bits == 4:
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=weight.dtype, **size)
            # In `eval`, it would repack weights in place, for some widths wrongly, and training could not continue.
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


_NEEDS: dict[str, tuple[tuple[int, int], str] | None] = {
    "int8_weight": None,
    "int4_weight": ((8, 0), "A100, RTX 30 or newer"),
    "fp8": ((8, 9), "L40S, RTX 40, H100 or newer"),
}
"""Quantiser -> the GPU it needs; None: any device works."""


class FastQuantisation:
    """Quantises linear layers with torchao for faster acting: reading the weights takes most of an action's time.

    This is for acting only; use `Quantisation` to train adapters on top. Do not move or cast a quantised model: it
    stays on its device in its dtype.

    Args:
        kind: `int8_weight` and `int4_weight` dequantise each weight while it is read; `fp8` also rounds the inputs.
        keep: parts (see `VLA.part`) whose layers are not quantised.
        group_size: for `int4_weight`, how many numbers share a scale.

    Raises:
        ValueError: for another kind.
    """

    trains = False

    def __init__(self, kind: str, keep: Sequence[str] = KEEP, group_size: int = 128) -> None:
        if kind not in _NEEDS:
            raise ValueError(f"quantisation of kind {kind!r} is not known; choose {', '.join(_NEEDS)}")
        self.kind, self.keep, self.group_size = kind, list(keep), group_size

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {"kind": self.kind, "keep": self.keep, "group_size": self.group_size}

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """As the protocol says."""
        if find_spec("torchao") is None:
            raise ValueError(f"quantisation={self.kind} needs torchao: {install('fast')}")
        if (needs := _NEEDS[self.kind]) is None:
            return
        capability, cards = needs
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < capability:
            number = ".".join(map(str, capability))
            raise ValueError(
                f"quantisation={self.kind} needs a GPU of compute capability {number} ({cards}), this is {device}; "
                "quantisation=int8_weight runs on any device"
            )
        if dtype != torch.bfloat16:
            raise ValueError(f"quantisation={self.kind} needs bfloat16: set dtype=bfloat16 instead of {dtype}")

    def __call__(self, vla: VLA, device: torch.device | str = "cpu") -> VLA:
        """Quantise `vla` in place, layer by layer, and put all of it on `device`.

        Raises:
            KeyError: the model has no such part; the message names its parts.
            ValueError: as `check`, or when the model was quantised before, or nothing is left to quantise.
        """
        self.check(torch.device(device), vla.llm.lm_head.weight.dtype)
        from torchao.quantization import quantize_  # slow to import, and needed only here

        names = set(quantised_names(vla, self.keep))
        quantize_(vla, self._torchao_config(), lambda module, name: name in names, device=torch.device(device))
        _place_others(vla, names, device)
        vla.quantisation = self.config
        return vla

    def _torchao_config(self) -> Any:
        from torchao import quantization

        if self.kind == "int8_weight":
            return quantization.Int8WeightOnlyConfig()
        if self.kind == "int4_weight":  # the layout of torch's own kernel needs no further package
            return quantization.Int4WeightOnlyConfig(
                group_size=self.group_size, int4_packing_format="tile_packed_to_4d"
            )
        return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())


def quantised_names(vla: VLA, keep: Sequence[str], divisor: int = 1) -> list[str]:
    """Names of the linear layers to quantise: all but those of `keep`, adapters and parts that released models lack."""
    if vla.quantisation is not None:
        raise ValueError(f"the model is quantised already: {vla.quantisation}")
    kept = {module for part in keep for top in vla.part(part) for module in top.modules()}
    kept |= {module for top in vla.added() for module in top.modules()}
    names = [
        name
        for name, module in vla.named_modules()
        if isinstance(module, nn.Linear) and module not in kept and ".lora_" not in name
        if module.in_features % divisor == 0
    ]
    if not names:
        raise ValueError(f"nothing to quantise: keep={list(keep)} leaves no linear layer of a width that can be")
    return names


def _place_others(vla: VLA, quantised: Iterable[str], device: torch.device | str) -> None:
    """Move everything to `device` except the quantised weights, which are there already."""
    placed = {f"{name}.weight" for name in quantised}
    for name, parameter in vla.named_parameters():
        if name not in placed:
            parameter.data = parameter.data.to(device)
    for module in vla.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)


def plain_state(vla: VLA, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state`, a `state_dict` of a quantised model, with dequantised weights."""
    layers = {name: module for name, module in vla.named_modules() if is_quantised(module)}
    weights = {f"{name}.weight": dequantised(layer) for name, layer in layers.items()}
    # a quantised weight has the scales of its blocks or rows beside it: `weight.absmax`, `SCB`, ...
    scales = {key for key in state for name in layers if key.startswith((f"{name}.weight", f"{name}.SCB"))}
    return {key: weights.get(key, value) for key, value in state.items() if key in weights or key not in scales}


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of 4 or 8 bits."""
    return isinstance(module, nn.Linear) and not module.weight.dtype.is_floating_point


def dequantised(layer: nn.Module) -> torch.Tensor:
    """The dequantised weight of a layer, float32."""
    import bitsandbytes as bnb

    weight: Any = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    state: Any = layer.state
    scales = state.SCB if weight.SCB is None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales).float()
