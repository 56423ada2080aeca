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
    """The part of an action head that the model uses."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    def network(self, dim: int) -> nn.Module | None:
        """The head's own module, beside a language model that is `dim` wide."""


@dataclass
class About:
    """Data about a model besides its weights; loading fills it in, and saving writes it.

    Attributes:
        norm_stats: dataset name -> action statistics in the released layout, for un-normalising.
        recipe: the resolved configuration of the model's training, for its model card; empty if unknown.
        json_files: name -> content of the JSON files of the released folder that the model was loaded from; saving
            keeps entries that this package does not set. Empty for a new model.
        folder: that folder; saving copies its tokenizer files.
        weights_from: path or hub id of all weights; None if they come from several places.
    """

    norm_stats: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    json_files: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    weights_from: str | None = None


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a model starts; see `VLA`.

    Attributes:
        path: folder, file or hub id.
        dtype: dtype of the weights from there; None: torch's default.
        vision_backbone: builds a backbone with its own weights, for checkpoints that may lack them.
    """

    path: str
    dtype: torch.dtype | None
    vision_backbone: Callable[[], VisionBackbone]


ADDED = ("proprio_projector", "action_head")


class VLA(SequenceModel):
    """OpenVLA: predicts action token ids from image and instruction (paper section 3).

    `state_dict()` has the released parameter names, so weights are loaded and saved without renaming.

    Args:
        vision_backbone: builds the vision backbone.
        projector: builds the projector from the backbone's and the language model's widths.
        llm: builds the language model.
        init_from: checkpoint to start from: a VLA or Prismatic VLM, as folder, file or hub id. The model is then
            built without weights, on the meta device, and `checkpoint.load.start_from` loads them, as in `VLAModule`.
            None: each part has its own weights.
        dtype: dtype of the weights from `init_from`: `bfloat16` halves a frozen model. None: torch's default.
        action_head: if it has a network, the model gets it as `action_head`, in float32.
        proprio_dim: P, how many numbers of proprioception the model reads, as one token after the patches; None: none.
        film: let the instruction scale and shift the towers' features. In training, `released` averages the text's
            embeddings including padding, as OpenVLA-OFT does, and `masked` without padding; true means `released`. None
            or false: no FiLM.

    Attributes:
        about: data about the model besides its weights.
        start: the checkpoint from which it starts; None: the weights of its parts.
        quantisation: how layers were quantised (see `Quantisation.config`); None if they were not.
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
        start_dtype = None if dtype is None else floating(dtype)
        self.start = None if init_from is None else Start(str(init_from), start_dtype, vision_backbone)
        self.quantisation: dict[str, Any] | None = None
        self.film = None if not film else check_padding("released" if film is True else film)
        self.proprio_dim = proprio_dim
        self._action_head: dict[str, Any] | None = None
        with nullcontext() if init_from is None else torch.device("meta"):
            backbone, language_model = vision_backbone(), llm()
            # The order of registration is the released order of parameters in saved files.
            self.vision_backbone = backbone
            self.projector = projector(backbone.dim, language_model.dim)
            self.language_model = language_model
            if self.film is not None:
                backbone.add_film(language_model.dim)
        # New parts start from random weights, with or without `init_from`.
        if proprio_dim is not None:
            self.proprio_projector = MLP(proprio_dim, language_model.dim)
        if action_head is not None and (network := action_head.network(language_model.dim)) is not None:
            self.action_head = network
            self._action_head = describe(action_head, USUAL_HEAD)

    @property
    def llm(self) -> CausalLM:
        """The language model; its attribute has the released name."""
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
        """Plain JSON data from which `from_config` rebuilds the same architecture."""
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
        """Build an architecture with random weights; inside `torch.device("meta")` without weights."""
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

        They start from random weights. Every strategy lets them learn in full, and they are never quantised.
        """
        parts = [getattr(self, name) for name in ADDED if hasattr(self, name)]
        return [*parts, *film_layers(self.vision_backbone)]

    def part(self, name: str) -> list[nn.Module]:
        """Modules of a named part, for strategies.

        Raises:
            KeyError: for an unknown name; the message lists the known ones.
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
            dtype: dtype of the parameters; None: as in the checkpoint.
            device: device to which the parameters are loaded.
            guard: check that the image reaches the logits.
            base: present location of an adapter's base; None: its location during training.

        Raises:
            CheckpointError: something does not fit; it lists all problems.
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

        Adapters are merged into the written weights, one layer at a time; this model does not change.

        Args:
            folder: created if necessary.
            processor: its tokenizer and image settings are written, too.
            max_shard_size: bytes of weights per file.
            dtype: dtype of the weights in the files; None: unchanged.
        """
        from openvla_lightning.checkpoint.save import save_vla

        save_vla(self, Path(folder), processor, max_shard_size, dtype)
