"""The vision-language-action model: towers, projector, language model."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from openvla_lightning.model.film import check_padding, film_layers
from openvla_lightning.model.llm import CausalLM
from openvla_lightning.model.parameters import floating
from openvla_lightning.model.projector import MLP, Projector
from openvla_lightning.model.sequence import SequenceModel
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.plugins import USUAL_HEAD, describe, rebuild
from openvla_lightning.types import VLAOutput

if TYPE_CHECKING:
    from openvla_lightning.processor import Processor

__all__ = ["VLA", "VLAOutput"]


class HasNetwork(Protocol):
    """What the model asks of an action head."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    def network(self, dim: int) -> nn.Module | None:
        """The head's own module, beside a language model that is `dim` wide."""


@dataclass
class About:
    """What is known of a model besides its weights: loading fills it in, saving writes it down.

    Attributes:
        norm_stats: dataset name -> action statistics in the released layout, for un-normalising.
        recipe: the resolved configuration this model was trained with, for its model card; empty when unknown.
        json_files: name -> content of the JSON files of the released folder this model came from; what of them no
            field of ours says is passed on when saving. Empty for a new model.
        folder: that folder, whose tokenizer files are passed on when saving.
        weights_from: where all weights come from, as a path or hub id; None when they come from several places.
    """

    norm_stats: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    json_files: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    weights_from: str | None = None


@dataclass(frozen=True)
class Start:
    """Whose weights a model is to start from; see `VLA`.

    Attributes:
        path: folder, file or hub id.
        dtype: of the weights that come from there; None: torch's default.
        vision_backbone: builds one with weights of its own, where those to come may lack them.
    """

    path: str
    dtype: torch.dtype | None
    vision_backbone: Callable[[], VisionBackbone]


ADDED = ("proprio_projector", "action_head")


class VLA(SequenceModel):
    """OpenVLA: image and instruction in, action token ids out (paper section 3).

    `state_dict()` has the released parameter names, so weights go in and out without renaming.

    Args:
        vision_backbone: builds the vision backbone.
        projector: builds the projector from the backbone's and the language model's widths.
        llm: builds the language model.
        init_from: whose weights to start from: a VLA or Prismatic VLM, as folder, file or hub id. The model is then
            built without weights, on the meta device, and `checkpoint.load.start_from` brings them, as `VLAModule`
            does. None: each part's own weights.
        dtype: of the weights that come from there: `bfloat16` halves a frozen model. None: torch's default.
        action_head: whose module, if it has one, the model gets as `action_head`, in float32.
        proprio_dim: P, how many numbers of proprioception the model reads, as one token after the patches; None: none.
        film: let the instruction scale and shift what the towers see: in training `released` takes the mean over the
            padding of a batch, too, as OpenVLA-OFT does, `masked` over the text alone; true means `released`. None or
            false: not.

    Attributes:
        about: what is known of it besides its weights.
        start: whose weights it is to start from; None for those of its parts.
        quantisation: how layers were quantised (see `Quantisation.config`); None when none were.
    """

    def __init__(
        self,
        vision_backbone: Callable[[], VisionBackbone],
        projector: Callable[[int, int], Projector],
        llm: Callable[[], CausalLM],
        init_from: str | Path | None = None,
        dtype: str | None = None,
        action_head: "HasNetwork | None" = None,
        proprio_dim: int | None = None,
        film: str | bool | None = None,
    ) -> None:
        super().__init__()
        self.about = About()
        kind = None if dtype is None else floating(dtype)
        self.start = None if init_from is None else Start(str(init_from), kind, vision_backbone)
        self.quantisation: dict[str, Any] | None = None
        self.film = None if not film else check_padding("released" if film is True else film)
        self.proprio_dim = proprio_dim
        self._action_head: dict[str, Any] | None = None
        with nullcontext() if init_from is None else torch.device("meta"):
            backbone, language_model = vision_backbone(), llm()
            # Registered in the released order, which is the order of parameters in saved files.
            self.vision_backbone = backbone
            self.projector = projector(backbone.dim, language_model.dim)
            self.language_model = language_model
            if self.film is not None:
                backbone.add_film(language_model.dim)
        # New parts begin with weights of their own, wherever the others come from.
        if proprio_dim is not None:
            self.proprio_projector = MLP(proprio_dim, language_model.dim)
        if action_head is not None and (network := action_head.network(language_model.dim)) is not None:
            self.action_head = network
            self._action_head = describe(action_head, USUAL_HEAD)

    @property
    def llm(self) -> CausalLM:
        """The language model; its attribute carries the released name."""
        return self.language_model

    @property
    def norm_stats(self) -> dict[str, Any]:
        """Dataset name -> action statistics in the released layout; those of `about`."""
        return self.about.norm_stats

    @norm_stats.setter
    def norm_stats(self, statistics: dict[str, Any]) -> None:
        self.about.norm_stats = statistics

    @property
    def config(self) -> dict[str, Any]:
        """Plain, JSON-able description that `from_config` rebuilds the same architecture from."""
        return {
            "vision_backbone": self.vision_backbone.config,
            "projector": self.projector.config,
            "llm": self.language_model.config,
            "released": self.about.json_files,
            **({} if self._action_head is None else {"action_head": self._action_head}),
            **({} if self.film is None else {"film": self.film}),
            **({} if self.proprio_dim is None else {"proprio_dim": self.proprio_dim}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VLA":
        """Build an architecture with random weights; inside `torch.device("meta")` with none."""
        vla = cls(
            vision_backbone=lambda: VisionBackbone.from_config(config["vision_backbone"]),
            projector=lambda in_dim, out_dim: Projector.from_config(config["projector"], in_dim, out_dim),
            llm=lambda: CausalLM.from_config(config["llm"]),
            action_head=rebuild(config["action_head"], USUAL_HEAD) if config.get("action_head") else None,
            proprio_dim=config.get("proprio_dim"),
            film=config.get("film"),
        )
        vla.about.json_files = dict(config.get("released") or {})
        return vla

    def added(self) -> list[nn.Module]:
        """The modules that a released VLA lacks: a head's network, the proprioception's projector, FiLM's layers.

        They start from random weights: every strategy lets them learn in full, and no quantisation touches them.
        """
        own = [getattr(self, name) for name in ADDED if hasattr(self, name)]
        return [*own, *film_layers(self.vision_backbone)]

    def part(self, name: str) -> list[nn.Module]:
        """Modules behind a part's name, for strategies.

        Raises:
            KeyError: for an unknown name, listing the known ones.
        """
        decoder = self.language_model.model
        parts: dict[str, list[nn.Module]] = {
            "vision_backbone": [self.vision_backbone],
            "projector": [self.projector],
            "llm": [self.language_model],
            "llm.embed_tokens": [decoder.embed_tokens],
            "llm.layers": list(decoder.layers),
            "llm.last_layer": [decoder.layers[-1]],
            "llm.lm_head": [self.language_model.lm_head],
            **{name: [getattr(self, name)] for name in ADDED if hasattr(self, name)},
        }
        if self.film is not None:
            parts["film"] = film_layers(self.vision_backbone)
        if name not in parts:
            raise KeyError(f"the model has no part {name!r}; parts: {', '.join(parts)}")
        return parts[name]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        guard: bool = True,
        base: str | Path | None = None,
    ) -> "VLA":
        """Load a VLA: Hugging Face folder or hub id, Prismatic run folder or `.pt`, a run or `.ckpt` of ours.

        Args:
            path: what to load.
            dtype: of the parameters; None keeps what the checkpoint holds.
            device: where the parameters go, while loading.
            guard: check that the image reaches the logits.
            base: where the base of an adapter is now; None: where it was during training.

        Raises:
            CheckpointError: for anything that does not fit, all problems at once.
        """
        from openvla_lightning.checkpoint.load import load_vla

        return load_vla(path, dtype=dtype, device=device, guard=guard, base=base)

    def save_pretrained(
        self,
        folder: str | Path,
        processor: "Processor | None" = None,
        max_shard_size: int = 5 * 10**9,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the released layout: config, safetensors (with an index when sharded), statistics, model card.

        Adapters are merged into what is written, one layer at a time; this model stays as it is.

        Args:
            folder: created where needed.
            processor: its tokenizer and image settings are written too.
            max_shard_size: bytes of weights per file.
            dtype: of the weights in the files; None: as they are.
        """
        from openvla_lightning.checkpoint.save import save_vla

        save_vla(self, Path(folder), processor, max_shard_size, dtype)
