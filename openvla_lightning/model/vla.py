"""The vision-language-action model: towers, projector, language model."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openvla_lightning.model.decoding import MOST_LIKELY, Choice, decode
from openvla_lightning.model.llm import CausalLM, next_token_loss
from openvla_lightning.model.parameters import floating
from openvla_lightning.model.projector import Projector
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.types import VLAOutput

if TYPE_CHECKING:
    from openvla_lightning.processor import Processor

__all__ = ["VLA", "VLAOutput"]


class VLA(nn.Module):
    """OpenVLA: image and instruction in, action token ids out (paper section 3).

    `state_dict()` has the released parameter names, so weights go in and out without renaming.

    Args:
        vision_backbone: builds the vision backbone.
        projector: builds the projector from the backbone's and the language model's widths.
        llm: builds the language model.
        init_from: whose weights to start from: a VLA or Prismatic VLM, as folder, file or hub id. None: each part's
            own weights.
        dtype: of the weights that are copied from there: `bfloat16` halves a frozen model. None: torch's default.

    Attributes:
        norm_stats: dataset name -> action statistics in the released layout, for un-normalising.
        released: file name -> contents of the released JSON files this model came from; empty for a new one.
        recipe: the resolved configuration this model was trained with, for its model card; empty when unknown.
        origin: the released folder this model was loaded from, whose tokenizer files are passed on when saving.
        init_from: where all weights were copied from when the model was built; None when they came from elsewhere.
        quantisation: how layers were quantised (see `Quantisation.config`); None when none were.
    """

    def __init__(
        self,
        vision_backbone: Callable[[], VisionBackbone],
        projector: Callable[[int, int], Projector],
        llm: Callable[[], CausalLM],
        init_from: str | Path | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.norm_stats: dict[str, Any] = {}
        self.released: dict[str, Any] = {}
        self.origin: Path | None = None
        self.recipe: dict[str, Any] = {}
        self.init_from: str | None = None
        self.quantisation: dict[str, Any] | None = None
        asked_for_meta = torch.get_default_device().type == "meta"
        load = init_from is not None and not asked_for_meta
        with torch.device("meta") if load else nullcontext():
            backbone, language_model = vision_backbone(), llm()
            # Registered in the released order, which is the order of parameters in saved files.
            self.vision_backbone = backbone
            self.projector = projector(backbone.dim, language_model.dim)
            self.language_model = language_model
        if load:
            from openvla_lightning.model.checkpoint import load_weights

            kind = None if dtype is None else floating(dtype)
            load_weights(self, str(init_from), vision_backbone, dtype=kind, device=None if kind is None else "cpu")

    @property
    def llm(self) -> CausalLM:
        """The language model; its attribute carries the released name."""
        return self.language_model

    @property
    def config(self) -> dict[str, Any]:
        """Plain, JSON-able description that `from_config` rebuilds the same architecture from."""
        return {
            "vision_backbone": self.vision_backbone.config,
            "projector": self.projector.config,
            "llm": self.language_model.config,
            "released": self.released,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VLA":
        """Build an architecture with random weights; inside `torch.device("meta")` with none."""
        vla = cls(
            vision_backbone=lambda: VisionBackbone.from_config(config["vision_backbone"]),
            projector=lambda in_dim, out_dim: Projector.from_config(config["projector"], in_dim, out_dim),
            llm=lambda: CausalLM.from_config(config["llm"]),
        )
        vla.released = dict(config.get("released") or {})
        return vla

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
        }
        if name not in parts:
            raise KeyError(f"the model has no part {name!r}; parts: {', '.join(parts)}")
        return parts[name]

    def forward(
        self,
        *,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> VLAOutput:
        """Run the model over whole sequences.

        Training gives `places` and, because its rows are padded on the right, no `attention_mask`: then logits are
        made of what is learnt alone, and nothing waits for the device.

        Args:
            pixel_values: float [B, C, H, W], three channels per tower; None for text alone.
            input_ids: int64 [B, L], beginning with BOS after any left padding.
            attention_mask: bool or int [B, L], zero on padding, which may be on either side.
            labels: int64 [B, L] aligned with `input_ids`, `IGNORE_INDEX` where nothing is learnt.
            places: int64 [B, K] indices into `input_ids[:, 1:]`: the next tokens to make logits for; None: logits of
                every position. For rows padded on the right.
            output_hidden_states: also return tower, projector and hidden features.
        """
        shift = _left_padding(attention_mask)
        features = None if pixel_values is None else self.vision_backbone.tower_features(pixel_values)
        visual = None if features is None else self.projector(self.vision_backbone.fuse(features))
        embeddings = self._embed(_roll(input_ids, shift), visual)
        # Padding is on the right by now, where causal attention never looks: no mask keeps the fast kernel.
        states = self.language_model.hidden_states(embeddings) if output_hidden_states else None
        hidden = self.language_model.decode(embeddings) if states is None else states[-1]
        num_patches = 0 if visual is None else visual.shape[1]
        if places is not None:
            rows = torch.arange(len(hidden), device=hidden.device)[:, None]
            hidden = hidden[rows, num_patches + places]
        output = VLAOutput(
            logits=self.language_model.logits(hidden),
            num_patches=num_patches,
            places=places,
            tower_features=features if output_hidden_states else None,
            projector_features=visual if output_hidden_states else None,
            hidden_states=states,
        )
        if labels is not None:
            targets = output.targets(_roll(labels, shift))
            output = replace(output, loss=next_token_loss(output.next_token_logits, targets))
        if shift is None:
            return output
        return replace(
            output,
            logits=_roll(output.logits, -shift),
            hidden_states=None if states is None else tuple(_roll(state, -shift) for state in states),
        )

    @torch.inference_mode()
    def generate(
        self,
        *,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 7,
        choice: Choice = MOST_LIKELY,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Ids [B, max_new_tokens] after prompts, plainly; `StaticDecoder` gives the same sooner.

        Arguments as in `forward`; `choice` says how ids are chosen, and draws come from `generator`, on the CPU. Rows
        of different length, padded on either side, give what each gives alone.
        """
        shift = _left_padding(attention_mask)
        visual = None if pixel_values is None else self.projector(self.vision_backbone(pixel_values))
        embeddings = self._embed(_roll(input_ids, shift), visual)
        lengths = None
        if attention_mask is not None and not bool(attention_mask.all()):
            lengths = attention_mask.long().sum(1) + (0 if visual is None else visual.shape[1])
        noise = choice.noise(self.language_model, len(input_ids), max_new_tokens, generator)
        return decode(self.language_model, embeddings, lengths, max_new_tokens, choice, noise)

    def _embed(self, input_ids: Tensor, visual: Tensor | None) -> Tensor:
        text = self.language_model.embed(input_ids)
        if visual is None:
            return text
        return torch.cat([text[:, :1], visual.to(text.dtype), text[:, 1:]], dim=1)

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
        from openvla_lightning.model.checkpoint import load_vla

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
        from openvla_lightning.model.saving import save_vla

        save_vla(self, Path(folder), processor, max_shard_size, dtype)


def _left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """How many padding positions open each row [B], or None when no row opens with padding."""
    if attention_mask is None or bool(attention_mask[:, 0].all()):
        return None
    return attention_mask.int().argmax(dim=1)


def _roll(rows: Tensor, shift: Tensor | None) -> Tensor:
    """Rotate each row [B, N, ...] to the left by its own `shift` [B]: left padding becomes right padding."""
    if shift is None:
        return rows
    index = (torch.arange(rows.shape[1], device=rows.device) + shift[:, None]) % rows.shape[1]
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]
