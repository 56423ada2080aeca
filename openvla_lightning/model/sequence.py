"""The language model's input sequence (BOS, images, proprioception, text) and the passes over it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openvla_lightning.model.decoding import MOST_LIKELY, Sampling, decode
from openvla_lightning.model.llm import CausalLM, next_token_loss
from openvla_lightning.model.positions import at, left_padding, roll, visible
from openvla_lightning.model.projector import MLP, Projector
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.types import VLAOutput

if TYPE_CHECKING:
    from openvla_lightning.types import Inputs


PASSES = ("states", "logits", "read", "see", "prompt", "generate")
"""Methods besides `forward` that run the model."""


@dataclass(frozen=True, slots=True)
class Read:
    """Input of a head that reads the whole prompt. S = 1 + patches and other tokens + L - 1 positions.

    Attributes:
        states: hidden states [B, S, dim].
        prompt: bool [B, S], False on padding and on the ids that the head wrote.
        logits: float32 [B, K, vocab] of the ids at `places`; None unless requested.
    """

    states: Tensor
    prompt: Tensor
    logits: Tensor | None = None


class SequenceModel(nn.Module):
    """Passes over BOS, the patches of V views, the proprioception's token and the other text.

    `VLA` builds the parts; this class combines them. With FSDP, only the methods in `PASSES` gather weights. None of
    them may call another one, which would free the weights too early.
    """

    vision_backbone: VisionBackbone
    projector: Projector
    language_model: CausalLM
    proprio_projector: MLP
    proprio_dim: int | None
    film: str | None

    def forward(
        self,
        *,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        proprio: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> VLAOutput:
        """Run the model over whole sequences.

        Training passes `places` and, because its rows are padded on the right, no `attention_mask`: then logits are
        computed only for the learnt tokens, and nothing waits for the device.

        Args:
            pixel_values: float [B, 3 * towers * V, H, W]; None for text alone.
            input_ids: int64 [B, L], beginning with BOS after any left padding.
            attention_mask: bool or int [B, L], zero on padding, which may be on either side.
            labels: int64 [B, L] aligned with `input_ids`, `IGNORE_INDEX` where nothing is learnt.
            places: int64 [B, K] indices into `input_ids[:, 1:]`: the next tokens to compute logits for; None: logits of
                every position. For rows padded on the right.
            proprio: float [B, P], normalised, if the model reads it.
            output_hidden_states: also return tower, projector and hidden features, of a single view.

        Raises:
            ValueError: when the model reads proprioception and there is none, or of another width.
        """
        shift = left_padding(attention_mask)
        text = self.language_model.embed(roll(input_ids, shift))
        features, visual = None, None
        if pixel_values is not None:
            language = self._language(text, roll(attention_mask, shift), places)
            if output_hidden_states:
                features = self.vision_backbone.tower_features(pixel_values, language)
                visual = self.projector(self.vision_backbone.fuse(features))
            else:
                visual = self.projector(self.vision_backbone(pixel_values, language))
        prefix = self._prefix(visual, proprio, text)
        embeddings = torch.cat([text[:, :1], prefix, text[:, 1:]], dim=1)
        # Padding is on the right here, where causal attention never looks; without a mask, the fast kernel is used.
        states = self.language_model.hidden_states(embeddings) if output_hidden_states else None
        read = None if places is None else prefix.shape[1] + places
        if states is not None:
            hidden = states[-1] if read is None else at(states[-1], read)
        elif read is not None:
            hidden = self.language_model.decode_at(embeddings, read)
        else:
            hidden = self.language_model.decode(embeddings)
        output = VLAOutput(
            logits=self.language_model.logits(hidden),
            num_patches=prefix.shape[1],
            places=places,
            tower_features=features,
            projector_features=visual if output_hidden_states else None,
            hidden_states=states,
        )
        if labels is not None:
            targets = output.targets(roll(labels, shift))
            output = replace(output, loss=next_token_loss(output.next_token_logits, targets))
        if shift is None:
            return output
        return replace(
            output,
            logits=roll(output.logits, -shift),
            hidden_states=None if states is None else tuple(roll(state, -shift) for state in states),
        )

    def see(self, inputs: "Inputs", written: int = 0) -> Tensor:
        """Visual tokens [B, V * P, dim] of the views in `inputs`; see `states`.

        Args:
            inputs: as in `states`.
            written: how many of the first tokens at `inputs.places` the head wrote; FiLM leaves them out of the mean
                embedding of the text.
        """
        return self._see(inputs, written)

    def _see(self, inputs: "Inputs", written: int) -> Tensor:
        language = None
        if self.film is not None:
            text = self.language_model.embed(inputs.input_ids)
            padding = self.film == "released" and self.training  # released policies act on single rows
            counted = torch.ones_like(inputs.input_ids) if padding else inputs.attention_mask
            counted = counted.bool().scatter(1, inputs.places[:, :written] + 1, False)
            language = (text * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
        return self.projector(self.vision_backbone(inputs.pixel_values, language))

    def states(
        self,
        inputs: "Inputs",
        *,
        slots: Tensor | Callable[[], Tensor] | None = None,
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
            slots: embeddings [B, N, dim] that replace those of the first N tokens at `places`: zeros for parallel
                decoding, projected noisy actions for diffusion. Or a function that returns them, for a head whose
                module computes them: with FSDP, it can only be called inside one of the model's passes.
            extra: embeddings [B, E, dim] of further tokens before the text, such as a diffusion timestep.
            causal: whether a position sees only earlier ones; False: it sees all positions except padding.
            visual: result of `see` for the same inputs, for callers with several passes over them.

        Raises:
            ValueError: when the model reads proprioception and there is none, or of another width.
        """
        embeddings, mask, places = self._sequence(inputs, slots, extra, visual)
        return self.language_model.decode_at(embeddings, places, None if causal else mask, causal)

    def logits(self, inputs: "Inputs", *, slots: Tensor) -> Tensor:
        """float32 logits [B, K, vocab] at `inputs.places` with non-causal attention, for parallel decoding.

        Arguments as in `states`.
        """
        embeddings, mask, places = self._sequence(inputs, slots, None, None)
        return self.language_model.logits(self.language_model.decode_at(embeddings, places, mask, causal=False))

    def _sequence(
        self,
        inputs: "Inputs",
        slots: Tensor | Callable[[], Tensor] | None,
        extra: Tensor | None,
        visual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The language model's input for `states`: embeddings [B, S, dim], a mask, and the positions to read.

        The mask is bool [B, S], or None if no padding is known; the positions are int64 [B, K].
        """
        text = self.language_model.embed(inputs.input_ids)
        slots = slots() if callable(slots) else slots
        if slots is not None:
            written = inputs.places[:, : slots.shape[1]] + 1
            rows = torch.arange(len(text), device=text.device)[:, None].expand_as(written)
            text = text.index_put((rows, written), slots.to(text.dtype))
        if visual is None:
            visual = self._see(inputs, 0 if slots is None else slots.shape[1])
        prefix = self._prefix(visual, inputs.proprio, text, extra)
        embeddings = torch.cat([text[:, :1], prefix, text[:, 1:]], dim=1)
        return embeddings, visible(inputs.attention_mask, prefix.shape[1]), prefix.shape[1] + inputs.places

    def read(self, inputs: "Inputs", layer: int | None = None, logits: bool = False) -> Read:
        """Hidden states of the whole prompt, for a head that reads all of them.

        Args:
            inputs: as in `states`; the ids at `places` are read, but are no part of the prompt.
            layer: number of the language model's layers to run; None: all of them and the final norm.
            logits: also compute the logits of the ids at `places`. Otherwise the layers above `layer` do not run.
        """
        text = self.language_model.embed(inputs.input_ids)
        prompt = inputs.attention_mask.bool()
        if inputs.places.shape[1]:
            prompt = prompt & (torch.arange(text.shape[1], device=text.device) <= inputs.places[:, :1])
        language = self._language(text, prompt, None)
        prefix = self._prefix(self.projector(self.vision_backbone(inputs.pixel_values, language)), inputs.proprio, text)
        embeddings = torch.cat([text[:, :1], prefix, text[:, 1:]], dim=1)
        prompt = torch.cat([prompt[:, :1].expand(-1, 1 + prefix.shape[1]), prompt[:, 1:]], dim=1)
        llm = self.language_model
        if layer is None:
            states = last = llm.decode(embeddings)
        else:
            states = llm.lower(embeddings, layer)
            last = llm.upper(states, layer) if logits else states
        return Read(states, prompt, llm.logits(at(last, prefix.shape[1] + inputs.places)) if logits else None)

    def _language(self, text: Tensor, attention_mask: Tensor | None, places: Tensor | None) -> Tensor | None:
        """FiLM's input for sequential writing of actions: the mean embedding [B, dim] of the prompt.

        The prompt ends where the first id of `places` is predicted, or at the end of the row if no id is written yet.
        """
        if self.film is None:
            return None
        prompt = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if attention_mask is not None:
            prompt &= attention_mask.bool()
        if places is not None:
            prompt &= torch.arange(text.shape[1], device=text.device) <= places[:, :1]
        return (text * prompt[..., None]).sum(1) / prompt.sum(1, keepdim=True)

    def _prefix(
        self, visual: Tensor | None, proprio: Tensor | None, text: Tensor, extra: Tensor | None = None
    ) -> Tensor:
        """The tokens between BOS and the other text [B, n, dim]: visual tokens, the proprioception's, `extra` ones."""
        tokens = [] if visual is None else [visual]
        if self.proprio_dim is not None and visual is not None:
            if proprio is None or proprio.shape[-1] != self.proprio_dim:
                got = "none" if proprio is None else f"{proprio.shape[-1]}"
                raise ValueError(f"this model reads {self.proprio_dim} numbers of proprioception, it was given {got}")
            tokens.append(self.proprio_projector(proprio.to(self.proprio_projector.fc1.weight.dtype))[:, None])
        tokens += [] if extra is None else [extra]
        return torch.cat([token.to(text.dtype) for token in tokens], dim=1) if tokens else text[:, :0]

    def prompt(
        self, pixel_values: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None, proprio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L + n, dim] of prompts, and the n of them between BOS and the other text.

        Arguments as in `forward`, with padding on the right.
        """
        return self._prompt(pixel_values, input_ids, attention_mask, proprio)

    def _prompt(
        self, pixel_values: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None, proprio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        text = self.language_model.embed(input_ids)
        visual = None
        if pixel_values is not None:
            language = self._language(text, attention_mask, None)
            visual = self.projector(self.vision_backbone(pixel_values, language))
        prefix = self._prefix(visual, proprio, text)
        return torch.cat([text[:, :1], prefix, text[:, 1:]], dim=1), prefix

    @torch.inference_mode()
    def generate(
        self,
        *,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        proprio: Tensor | None = None,
        max_new_tokens: int = 7,
        choice: Sampling = MOST_LIKELY,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Ids [B, max_new_tokens] after prompts: the reference, of which `StaticDecoder` is the fast version.

        Arguments as in `forward`; `choice` says how ids are chosen, and `generator`, on the CPU, samples. Rows may have
        different lengths and padding on either side; each gives the same ids as alone.
        """
        shift = left_padding(attention_mask)
        embeddings, prefix = self._prompt(pixel_values, roll(input_ids, shift), roll(attention_mask, shift), proprio)
        lengths = None
        if attention_mask is not None and not bool(attention_mask.all()):
            lengths = attention_mask.long().sum(1) + prefix.shape[1]
        noise = choice.noise(self.language_model, len(input_ids), max_new_tokens, generator)
        return decode(self.language_model, embeddings, lengths, max_new_tokens, choice, noise)
