"""Low-rank adapters, injected by peft."""

import copy
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from openvla_lightning.model.vla import VLA

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

RELEASED_TARGETS = frozenset(
    [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
        "fc1",
        "fc2",
        "fc3",
        "qkv",
        "proj",
        "q",
        "kv",
    ]
)
"""Last names of the modules that the released fine-tuning script adapts: every linear layer, `lm_head` included, and,
because peft 0.11 matched by suffix, both ViT patch embeddings' convolution `proj`."""

TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj", "attn.qkv", "attn.proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj", "mlp.fc1", "mlp.fc2"],
}
"""Names for common choices: attention or feed-forward layers, of language model and vision towers."""

_KEEP_BASE = (True, False, "gaussian", "orthogonal")
"""peft's initialisations that do not change the layer under the adapter; `pissa` and similar ones rewrite it."""


class LoRA:
    """LoRA as released: adapters on every linear layer, everything else frozen (paper section 5.3).

    Args:
        rank: rank of each adapter.
        alpha: adapters are scaled by alpha / rank; None means min(rank, 16), as released.
        dropout: dropout before each adapter.
        targets: `released` for the released set of modules, `linear` for every linear layer, `attention`, `mlp`, or
            one or several module names: full names, their ends (`q_proj`), or patterns (`*.layers.1?.mlp.*`).
        init: peft's `init_lora_weights` (`gaussian` as released; `pissa`, `olora`, ... or true for peft's default).
        use_rslora: scale by alpha / sqrt(rank).
        use_dora: weight-decomposed LoRA.
        within: parts (see `TrainOnly`) that get adapters; None: all. The other parts are frozen.
        also_train: parts without adapters that learn in full.

    Modules that no released VLA has (`VLA.added`: a head's network, the proprioception's projector, FiLM) learn in
    full.
    """

    def __init__(
        self,
        rank: int,
        alpha: int | None = None,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "released",
        init: str | bool = "gaussian",
        use_rslora: bool = False,
        use_dora: bool = False,
        within: Sequence[str] | None = None,
        also_train: Sequence[str] = (),
    ) -> None:
        if rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRA dropout is a probability below 1, got {dropout}")
        if alpha is not None and alpha <= 0:
            raise ValueError(f"LoRA alpha scales what the adapters learn: it must be positive, got {alpha}")
        self.rank, self.dropout, self.init = rank, dropout, init
        self.alpha = min(rank, 16) if alpha is None else alpha
        self.targets: str | list[str] = targets if isinstance(targets, str) else list(targets)
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self.within = None if within is None else list(within)
        self.also_train = list(also_train)

    @property
    def adapts(self) -> bool:
        """As the protocol says."""
        return self.init in _KEEP_BASE

    @property
    def config(self) -> dict[str, Any]:
        """As the protocol says."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": self.targets,
            "init": self.init,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "within": self.within,
            "also_train": self.also_train,
        }

    def apply(self, vla: VLA) -> None:
        """Inject adapters into `vla` in place; afterwards only they (and `also_train`) learn, in float32.

        Raises:
            KeyError: the model has no such part; the message names its parts.
            ValueError: when no module matches `targets`.
        """
        self._inject(vla, self.init)

    def inject(self, vla: VLA) -> None:
        """As `apply`, for adapters whose weights are loaded next, so their initialisation does not matter."""
        self._inject(vla, init=True)

    def _inject(self, vla: VLA, init: str | bool) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # imports bitsandbytes, which takes two seconds

        names = sorted(self._matches(vla))
        if not names:
            where = ", ".join(self.within or ["this model"])
            known = ", ".join(["released", "linear", *TARGETS])
            raise ValueError(
                f"LoRA targets {self.targets!r} match no module of {where}; choose {known}, or names such as q_proj"
            )
        vla.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            init_lora_weights=init,  # type: ignore[arg-type]
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )
        inject_adapter_in_model(config, vla)
        for part in self.also_train:
            for module in vla.part(part):
                if not all(parameter.is_floating_point() for parameter in module.parameters()):
                    raise ValueError(f"{part} is quantised and cannot learn: add it to quantisation.keep")
                module.requires_grad_(True)
        for module in vla.added():
            module.requires_grad_(True)
        for parameter in vla.parameters():
            if parameter.requires_grad:  # 16 bits would lose small steps, for any dtype of the frozen weights
                parameter.data = parameter.data.float()

    def _matches(self, vla: VLA) -> Iterator[str]:
        """Full names of the modules to adapt."""
        inside = None if self.within is None else _modules(vla, self.within)
        outside = _modules(vla, self.also_train) | {module for top in vla.added() for module in top.modules()}
        chosen = [self.targets] if isinstance(self.targets, str) else self.targets
        ends = [end for name in chosen for end in TARGETS.get(name, [name])]
        for name, module in vla.named_modules():
            if module in outside or not (inside is None or module in inside):
                continue
            if self.targets == "linear":
                wanted = isinstance(module, nn.Linear)
            elif self.targets == "released":
                wanted = name.rpartition(".")[2] in RELEASED_TARGETS and isinstance(module, nn.Linear | nn.Conv2d)
            else:
                wanted = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and any(
                    name == end or name.endswith(f".{end}") or fnmatchcase(name, end) for end in ends
                )
            if wanted:
                yield name


def _modules(vla: VLA, parts: Sequence[str]) -> set[nn.Module]:
    return {module for part in parts for top in vla.part(part) for module in top.modules()}


def merge(vla: VLA) -> None:
    """Merge every adapter into its layer, in place; parameter names are then the base model's again.

    Raises:
        ValueError: when a layer is quantised: load the base without quantisation and merge there.
    """
    for name, module in adapted_layers(vla).items():
        parent, _, child = name.rpartition(".")
        setattr(vla.get_submodule(parent), child, _merged(module))


def adapted_layers(model: nn.Module) -> "dict[str, BaseTunerLayer]":
    """Name -> layer, for layers with adapters. Without an earlier import of peft, there are none."""
    if "peft.tuners.tuners_utils" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def merged_state(vla: VLA) -> "dict[str, tuple[Tensor, BaseTunerLayer | None]]":
    """The model's `state_dict` under the base's names: each tensor, and the layer whose adapter it needs merged.

    This computes nothing; `merged_weight` merges one layer at a time.
    """
    layers = adapted_layers(vla)
    state: dict[str, tuple[Tensor, BaseTunerLayer | None]] = {}
    for key, tensor in vla.state_dict().items():
        name, is_base, parameter = key.partition(".base_layer.")
        if is_base and name in layers:
            state[f"{name}.{parameter}"] = (tensor, layers[name] if parameter == "weight" else None)
        elif ".lora_" not in key:
            state[key] = (tensor, None)
    return state


def merged_weight(layer: "BaseTunerLayer") -> Tensor:
    """The weight of an adapted layer with the adapter merged, float32; the layer itself does not change."""
    return _merged(copy.deepcopy(layer), keep_dtype=False).weight.detach()


def _merged(layer: Any, keep_dtype: bool = True) -> Any:
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    if not dtype.is_floating_point:
        raise ValueError("the layer under the adapter is quantised: load its base without quantisation and merge there")
    layer.float()  # 16 bits would lose small values of the adapter's product
    layer.merge()
    return base.to(dtype) if keep_dtype else base
