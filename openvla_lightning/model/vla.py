"""The vision-language-action model: towers, projector, language model."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openvla_lightning.model import sequence
from openvla_lightning.model.decoding import MOST_LIKELY, Choice, decode
from openvla_lightning.model.film import check_padding, film_layers
from openvla_lightning.model.llm import CausalLM, next_token_loss
from openvla_lightning.model.parameters import floating
from openvla_lightning.model.projector import MLP, Projector
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.types import VLAOutput

if TYPE_CHECKING:
    from openvla_lightning.processor import Processor
    from openvla_lightning.types import Inputs

__all__ = ["VLA", "VLAOutput"]

ADDED = ("proprio_projector", "action_head")


class VLA(nn.Module):
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
        proprio_dim: P, how many numbers of proprioception the model reads, as one token after the patches; None: none.
        film: let the instruction scale and shift what the towers see: `released` takes the mean over the padding of a
            batch, too, as OpenVLA-OFT does, `masked` over the text alone; true means `released`. None or false: not.

    Attributes:
        norm_stats: dataset name -> action statistics in the released layout, for un-normalising.
        released: file name -> contents of the released JSON files this model came from; empty for a new one.
        recipe: the resolved configuration this model was trained with, for its model card; empty when unknown.
        origin: the released folder this model was loaded from, whose tokenizer files are passed on when saving.
        init_from: where all weights come from; None when they came from elsewhere.
        init_dtype: of the weights that come from there; None: torch's default.
        fresh_vision: builds the vision backbone with weights of its own, where those to come may lack them.
        quantisation: how layers were quantised (see `Quantisation.config`); None when none were.
    """

    def __init__(
        self,
        vision_backbone: Callable[[], VisionBackbone],
        projector: Callable[[int, int], Projector],
        llm: Callable[[], CausalLM],
        init_from: str | Path | None = None,
        dtype: str | None = None,
        proprio_dim: int | None = None,
        film: str | bool | None = None,
    ) -> None:
        super().__init__()
        self.norm_stats: dict[str, Any] = {}
        self.released: dict[str, Any] = {}
        self.origin: Path | None = None
        self.recipe: dict[str, Any] = {}
        self.init_from: str | None = None if init_from is None else str(init_from)
        self.init_dtype = None if dtype is None else floating(dtype)
        self.fresh_vision = None if init_from is None else vision_backbone
        self.quantisation: dict[str, Any] | None = None
        self.film = None if not film else check_padding("released" if film is True else film)
        self.proprio_dim = proprio_dim
        with nullcontext() if init_from is None else torch.device("meta"):
            backbone, language_model = vision_backbone(), llm()
            # Registered in the released order, which is the order of parameters in saved files.
            self.vision_backbone = backbone
            self.projector = projector(backbone.dim, language_model.dim)
            self.language_model = language_model
            if self.film is not None:
                backbone.add_film(language_model.dim)
            if proprio_dim is not None:
                self.proprio_projector = MLP(proprio_dim, language_model.dim)

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
            proprio_dim=config.get("proprio_dim"),
            film=config.get("film"),
        )
        vla.released = dict(config.get("released") or {})
        return vla

    def attach(self, network: nn.Module | None) -> None:
        """Take over the network of an action head, if it has one: its weights are the model's from now on."""
        if network is not None:
            self.action_head = network

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
        shift = sequence.left_padding(attention_mask)
        features = None if pixel_values is None else self.vision_backbone.tower_features(pixel_values)
        visual = None if features is None else self.projector(self.vision_backbone.fuse(features))
        embeddings = self._embed(sequence.roll(input_ids, shift), visual)
        # Padding is on the right by now, where causal attention never looks: no mask keeps the fast kernel.
        states = self.language_model.hidden_states(embeddings) if output_hidden_states else None
        hidden = self.language_model.decode(embeddings) if states is None else states[-1]
        num_patches = 0 if visual is None else visual.shape[1]
        if places is not None:
            hidden = sequence.at(hidden, num_patches + places)
        output = VLAOutput(
            logits=self.language_model.logits(hidden),
            num_patches=num_patches,
            places=places,
            tower_features=features if output_hidden_states else None,
            projector_features=visual if output_hidden_states else None,
            hidden_states=states,
        )
        if labels is not None:
            targets = output.targets(sequence.roll(labels, shift))
            output = replace(output, loss=next_token_loss(output.next_token_logits, targets))
        if shift is None:
            return output
        return replace(
            output,
            logits=sequence.roll(output.logits, -shift),
            hidden_states=None if states is None else tuple(sequence.roll(state, -shift) for state in states),
        )

    def see(self, inputs: "Inputs", written: int = 0) -> Tensor:
        """Visual tokens [B, V * P, dim] of the views in `inputs`, as `states` puts them into the sequence.

        Args:
            inputs: as in `states`.
            written: how many of the first tokens at `inputs.places` the head wrote: FiLM, which is told the mean
                embedding of the text, leaves them out.
        """
        return sequence.see(self, inputs, written)

    def states(
        self,
        inputs: "Inputs",
        *,
        slots: Tensor | None = None,
        extra: Tensor | None = None,
        causal: bool = True,
        visual: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, K, dim] after the final norm, of the positions that predict the text's `inputs.places`.

        The sequence is BOS, the patches of V views, the proprioception's token, `extra` tokens, the other text; as in
        OpenVLA-OFT (`forward` of its `modeling_prismatic.py`). A place is read where its token would be predicted, one
        position before it, also when attention is not causal.

        Args:
            inputs: normalised `pixel_values` [B, 3 * towers * V, H, W], `input_ids` [B, L] with padding on the right,
                `attention_mask`, `places` [B, K], and `proprio` [B, P] where the model reads it.
            slots: embeddings [B, N, dim] that stand in for those of the first N tokens at `places`: zeros for parallel
                decoding, projected noisy actions for diffusion.
            extra: embeddings [B, E, dim] of further tokens before the text, such as a diffusion timestep.
            causal: whether a position sees only what came before it; False: all that is no padding.
            visual: what `see` gave for the same inputs, for whoever asks more than once.

        Raises:
            ValueError: when the model reads proprioception and there is none, or of another width.
        """
        embeddings, prefix = sequence.build(self, inputs, slots, extra, visual)
        mask = None if causal else sequence.visible(inputs.attention_mask, prefix)
        hidden = self.language_model.decode(embeddings, mask, causal=causal)
        return sequence.at(hidden, prefix + inputs.places)

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
        shift = sequence.left_padding(attention_mask)
        visual = None if pixel_values is None else self.projector(self.vision_backbone(pixel_values))
        embeddings = self._embed(sequence.roll(input_ids, shift), visual)
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
