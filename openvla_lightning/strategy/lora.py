"""Low-rank adapters, injected by peft."""

from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from openvla_lightning.model.vla import VLA

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


class LoRA:
    """LoRA as released: adapters on every linear layer, everything else frozen (paper section 5.3).

    Args:
        rank: of each adapter.
        alpha: adapters are scaled by alpha / rank; None means min(rank, 16), as released.
        dropout: in front of each adapter.
        targets: `released` for the released set of modules, `linear` for every linear layer, or a list of module
            names, each a full name or its end (`q_proj`, `vision_backbone.featurizer.blocks.0.attn.qkv`).
        init: peft's `init_lora_weights` (`gaussian` as released; `pissa`, `olora`, ... or true for peft's default).
        use_rslora: scale by alpha / sqrt(rank).
        use_dora: weight-decomposed LoRA.
        also_train: parts (see `TrainOnly`) that learn in full beside the adapters.
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
        also_train: Sequence[str] = (),
    ) -> None:
        if rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {rank}")
        self.rank, self.dropout, self.init = rank, dropout, init
        self.alpha = min(rank, 16) if alpha is None else alpha
        self.targets: str | list[str] = targets if isinstance(targets, str) else list(targets)
        self.use_rslora, self.use_dora, self.also_train = use_rslora, use_dora, list(also_train)

    @property
    def config(self) -> dict[str, Any]:
        """As the protocol says."""
        return {
            "name": "LoRA",
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": self.targets,
            "init": self.init,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "also_train": self.also_train,
        }

    def apply(self, vla: VLA) -> None:
        """Inject adapters into `vla` in place; afterwards only they (and `also_train`) require gradients.

        Raises:
            ValueError: when no module matches `targets`.
        """
        names = sorted(self._matches(vla))
        if not names:
            raise ValueError(f"LoRA targets {self.targets!r} match no module of this model")
        vla.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            init_lora_weights=self.init,  # type: ignore[arg-type]
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )
        inject_adapter_in_model(config, vla)
        for part in self.also_train:
            for module in vla.part(part):
                module.requires_grad_(True)

    def _matches(self, vla: VLA) -> Iterator[str]:
        """Full names of the modules to adapt."""
        for name, module in vla.named_modules():
            last = name.rpartition(".")[2]
            if self.targets == "linear":
                wanted = isinstance(module, nn.Linear)
            elif self.targets == "released":
                wanted = last in RELEASED_TARGETS and isinstance(module, nn.Linear | nn.Conv2d)
            else:
                wanted = any(name == target or name.endswith(f".{target}") for target in self.targets)
            if wanted:
                yield name


def merge(vla: VLA) -> None:
    """Fold every adapter into the layer it sits on, in place; parameter names are the base model's again."""
    for name, module in list(vla.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(vla.get_submodule(parent), child, module.get_base_layer())
