"""Weights in 8 or 4 bits: by bitsandbytes to train adapters on top (QLoRA), by torchao to act sooner."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import nn

from openvla_lightning.model.vla import VLA

KINDS = ("nf4", "fp4")
_BLOCK = 64  # 4-bit numbers that share a scale
KEEP = ("vision_backbone", "llm.lm_head")
"""Parts that stay as they are unless told otherwise: few of the weights, and much of the accuracy."""


class Quantiser(Protocol):
    """A way to quantise a model."""

    trains: bool
    """Whether adapters can learn on top."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError, saying what is missing, where this cannot be had."""

    def __call__(self, vla: VLA, device: torch.device | str = "cpu") -> VLA:
        """Quantise `vla` in place, and put all of it on `device`."""


class Quantisation:
    """Replaces linear layers by quantised ones; the dtype that they compute in stays as it was.

    Do not move or cast a quantised model: it stays on its device in its dtype.

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

        Adapters stay as they are; layers under them are quantised.

        Raises:
            KeyError: for a part the model does not have, naming those it has.
            ValueError: when the model was quantised before, or nothing is left to quantise.
        """
        names = quantised_names(vla, self.keep, self._divisor(torch.device(device)))
        for name in names:
            parent, _, child = name.rpartition(".")
            owner = vla.get_submodule(parent)
            setattr(owner, child, self._quantised(getattr(owner, child), torch.device(device)))
        _place_others(vla, names, device)
        vla.quantisation = self.config
        setattr(vla, f"is_loaded_in_{self.bits}bit", True)  # what peft looks at
        return vla

    def _divisor(self, device: torch.device) -> int:
        # bitsandbytes 0.50 reads other widths wrongly on a CPU; of the 7B models only SigLIP's `fc2` has one
        return _BLOCK if self.bits == 4 and device.type == "cpu" else 1

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


_NEEDS: dict[str, tuple[tuple[int, int], str] | None] = {
    "int8_weight": None,
    "int4_weight": ((8, 0), "A100, RTX 30 or newer"),
    "fp8": ((8, 9), "L40S, RTX 40, H100 or newer"),
}
"""Quantiser -> the GPU it needs; None: any device will do."""


class FastQuantisation:
    """Linear layers whose weights are read in fewer bits, by torchao, which is what acting waits for.

    This is for acting alone: adapters on top learn with `Quantisation`. Do not move or cast a quantised model: it stays
    on its device in its dtype.

    Args:
        kind: `int8_weight` and `int4_weight` widen each weight while it is read; `fp8` also rounds what it multiplies.
        keep: parts (see `VLA.part`) whose layers stay as they are.
        group_size: of `int4_weight`: numbers that share a scale.

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
            raise ValueError(f"quantisation={self.kind} needs torchao: pip install 'openvla-lightning[fast]'")
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
            KeyError: for a part the model does not have, naming those it has.
            ValueError: as `check`, or when the model was quantised before, or nothing is left to quantise.
        """
        self.check(torch.device(device), vla.llm.lm_head.weight.dtype)
        from torchao.quantization import quantize_  # slow to import, and of no use without quantisation

        names = set(quantised_names(vla, self.keep))
        quantize_(vla, self._torchao_config(), lambda module, name: name in names, device=torch.device(device))
        _place_others(vla, names, device)
        vla.quantisation = self.config
        return vla

    def _torchao_config(self) -> Any:
        from torchao import quantization

        if self.kind == "int8_weight":
            return quantization.Int8WeightOnlyConfig()
        if self.kind == "int4_weight":  # the layout of torch's own kernel: no further package
            return quantization.Int4WeightOnlyConfig(
                group_size=self.group_size, int4_packing_format="tile_packed_to_4d"
            )
        return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())


def quantised_names(vla: VLA, keep: Sequence[str], divisor: int = 1) -> list[str]:
    """Names of the linear layers to quantise: of released models' parts but those to keep, adapters left out."""
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
    """Put everything but the quantised weights, which are there, on `device`."""
    placed = {f"{name}.weight" for name in quantised}
    for name, parameter in vla.named_parameters():
        if name not in placed:
            parameter.data = parameter.data.to(device)
    for module in vla.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)


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
