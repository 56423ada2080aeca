"""The language model: any decoder of transformers, built from plain numbers."""

import math
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PretrainedConfig

from openvla_lightning.model.attention import ATTENTIONS, CAUSAL, Run, run_layer
from openvla_lightning.model.hub import check_source
from openvla_lightning.model.last_layer import READS_ALONE, add_read_places
from openvla_lightning.model.positions import at
from openvla_lightning.model.tower import parameters_follow_default_device
from openvla_lightning.types import IGNORE_INDEX

_NOT_ARCHITECTURE = {"model_type", "torch_dtype", "dtype", "auto_map", "quantization_config", "_name_or_path"}
_NOT_ARCHITECTURE |= {"attn_implementation", "_attn_implementation"}

FAMILIES = ("llama", "mistral", "qwen2", "phi")
"""`model_type`s whose decoder consists only of embedding, layers and norm."""


class CausalLM(nn.Module):
    """A decoder with its output head, under the parameter names transformers gives them.

    Args:
        name: local folder or hub id of tokenizer and pretrained weights (`tiny` needs neither).
        architecture: `model_type` and the fields of that transformers config; absent fields take transformers'
            defaults, as in the released `text_config`. Its `vocab_size` counts rows of the embedding, padding included.
        vocab_size: ids of the tokenizer in use, without padding; action ids are the last ones below it.
        pretrained: load the weights of `name`; not on the meta device.
        smooth_actions: how many ids below `vocab_size` start as smooth functions of their place, in embedding and head,
            so that learning one action bin also improves its neighbours. For models from scratch, 256 saves most of the
            training that random rows need. Use 0 for pretrained ones, as released.
        attention: implementation of non-causal attention (`decode(causal=False)`): `sdpa`, `eager` or
            `flash_attention_2`. Causal attention is always `sdpa`. This is not part of the model, so not in `config`.

    Attributes:
        dim: width of an embedding.
    """

    def __init__(
        self,
        name: str,
        architecture: Mapping[str, Any],
        vocab_size: int,
        pretrained: bool = False,
        smooth_actions: int = 0,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {attention!r}; known: {', '.join(ATTENTIONS)}")
        if attention.startswith("flash") and find_spec("flash_attn") is None:
            raise ValueError(f"attention={attention} needs the package flash-attn; sdpa needs nothing")
        self.attention = attention
        self.name, self.vocab_size, self.smooth_actions = name, vocab_size, smooth_actions
        self.architecture = dict(architecture)
        config = _transformers_config(self.architecture)
        if vocab_size > config.vocab_size:
            raise ValueError(f"{name}: vocab_size={vocab_size} exceeds the embedding's {config.vocab_size} rows")
        self.dim: int = config.hidden_size
        with parameters_follow_default_device():
            decoder = AutoModelForCausalLM.from_config(config)
        if pretrained and torch.get_default_device().type != "meta":
            _load_pretrained(decoder, name)
        self.model, self.lm_head = decoder.model, decoder.lm_head
        if config.model_type in READS_ALONE:
            add_read_places(self.model.layers[-1])
        self.tied = bool(config.tie_word_embeddings)
        self.tie_weights()
        if smooth_actions and self.lm_head.weight.device.type != "meta":
            self._smooth_rows(smooth_actions, config.initializer_range)

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "vocab_size": self.vocab_size,
            "smooth_actions": self.smooth_actions,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CausalLM":
        """Rebuild, with random weights."""
        return cls(**{k: v for k, v in config.items() if k != "gradient_checkpointing"})  # in earlier checkpoints

    def tie_weights(self) -> None:
        """Make head and embedding one parameter again, if the architecture ties them."""
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def _smooth_rows(self, count: int, std: float) -> None:
        """Random Fourier features of the place in [-1, 1]; places within about a tenth of the range are similar."""
        place = torch.linspace(-1, 1, count)[:, None]
        waves = torch.cos(place * 4.0 * torch.randn(1, self.dim) + 2 * math.pi * torch.rand(1, self.dim))
        for weight in (self.model.embed_tokens.weight, self.lm_head.weight):
            weight[self.vocab_size - count : self.vocab_size] = (waves * math.sqrt(2) * std).to(weight)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, L, dim] of ids [B, L]."""
        return self.model.embed_tokens(input_ids)

    def decode(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Hidden states [B, S, dim] after the final norm, from embeddings [B, S, dim].

        Args:
            embeddings: of the whole sequence, or of the part after the cache.
            attention_mask: bool or int [B, S], zero at masked positions; None: no position is masked.
            position_ids: int64 [B, S]; None: counted from the cache's end.
            cache: keys and values of earlier positions; new ones are added to it.
            causal: whether a position sees only earlier ones. False: it sees the whole sequence (as in OpenVLA-OFT),
                for which there is no cache.
        """
        config = self.model.config
        if not causal:
            if cache is not None:
                raise ValueError("attention in both directions sees the whole sequence at once: it takes no cache")
            return self._attend_to_all(embeddings, attention_mask, position_ids).last_hidden_state
        window = getattr(config, "sliding_window", None) or embeddings.shape[1]
        plain = cache is None and attention_mask is None and embeddings.shape[1] <= window
        config._attn_implementation = CAUSAL if plain else "sdpa"
        return self.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def decode_at(
        self,
        embeddings: Tensor,
        places: Tensor,
        attention_mask: Tensor | None = None,
        causal: bool = True,
        run: Run = run_layer,
    ) -> Tensor:
        """Hidden states [B, K, dim] at `places` [B, K] of `decode`; the last layer is computed for these alone.

        `run` runs a layer, for callers with a compiled version of `run_layer`.
        """
        decoder, length = self.model, embeddings.shape[1]
        family = decoder.config.model_type
        window = getattr(decoder.config, "sliding_window", None) or length
        stack = attention_mask is None and length <= window if causal else self.attention == "sdpa"
        if family not in FAMILIES or not stack:
            return at(self.decode(embeddings, attention_mask, causal=causal), places)
        seen = None if attention_mask is None else attention_mask.bool()[:, None, None]
        alone = family in READS_ALONE
        hidden, rotary = self._through(embeddings, decoder.layers[: -1 if alone else None], seen, causal, run)
        if not alone:
            return self.norm(at(hidden, places))
        if causal:
            seen = (torch.arange(length, device=places.device) <= places[..., None])[:, None]
        return self.norm(decoder.layers[-1].read_places(hidden, seen, rotary, places))

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm of hidden states [..., dim]."""
        decoder: Any = self.model
        return (decoder.final_layernorm if hasattr(decoder, "final_layernorm") else decoder.norm)(hidden)

    def attend_without_mask(self) -> None:
        """Make the decoder's layers use `sdpa` with exactly the given mask, for callers that run single layers."""
        self.model.config._attn_implementation = CAUSAL

    def _attend_to_all(
        self, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor | None, output_hidden_states: bool = False
    ) -> Any:
        """The output of transformers' decoder when every position sees all positions that `mask` [B, S] allows.

        The decoder's classes are causal. They combine a mask of two dimensions with the causal triangle (with `eager`
        also no mask), but use a mask of four dimensions unchanged. `is_causal` is set to False for the attention.
        """
        config, width = self.model.config, embeddings.shape[1]
        hidden: Tensor | None = None if mask is None else mask.bool()
        attention_mask: Tensor | None
        if self.attention == "eager":  # `eager` adds the mask to the scores
            hidden = torch.ones(1, width, dtype=torch.bool, device=embeddings.device) if hidden is None else hidden
            scores = torch.zeros(hidden.shape, dtype=embeddings.dtype, device=embeddings.device)
            scores = scores.masked_fill(~hidden, torch.finfo(embeddings.dtype).min)
            attention_mask, name = scores[:, None, None].expand(-1, 1, width, -1), "eager"
        elif self.attention == "sdpa":
            attention_mask = None if hidden is None else hidden[:, None, None].expand(-1, 1, width, -1)
            name = CAUSAL
        else:
            attention_mask, name = hidden, self.attention
        config._attn_implementation = name
        return self.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            is_causal=False,
        )

    def hidden_states(
        self, embeddings: Tensor, attention_mask: Tensor | None = None, causal: bool = True
    ) -> tuple[Tensor, ...]:
        """The embeddings and each layer's output [B, S, dim]; the last one is after the final norm.

        Arguments as in `decode`; with causal attention, the mask is ignored.
        """
        if not causal:
            return self._attend_to_all(embeddings, attention_mask, None, output_hidden_states=True).hidden_states
        self.model.config._attn_implementation = CAUSAL
        return self.model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True).hidden_states

    def lower(self, embeddings: Tensor, layers: int) -> Tensor:
        """Hidden states [B, S, dim] after the first `layers` layers, causal; later layers do not run.

        Raises:
            ValueError: for more layers than there are, or an architecture that is more than a stack of layers.
        """
        decoder: Any = self.model
        if self.architecture["model_type"] not in FAMILIES:
            raise ValueError(f"{self.architecture['model_type']} cannot be read half way; {', '.join(FAMILIES)} can")
        if not 1 <= layers <= len(decoder.layers):
            raise ValueError(f"layer {layers} cannot be read: the language model has {len(decoder.layers)}")
        return self._through(embeddings, decoder.layers[:layers], None, causal=True)[0]

    def upper(self, hidden: Tensor, layers: int) -> Tensor:
        """Hidden states [B, S, dim] after the other layers and the final norm, from those of `lower`."""
        decoder: Any = self.model
        return self.norm(self._through(hidden, decoder.layers[layers:], None, causal=True)[0])

    def _through(
        self, hidden: Tensor, layers: Iterable[nn.Module], mask: Tensor | None, causal: bool, run: Run = run_layer
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states [B, S, dim] after some layers, and the positions' rotary waves; the mask is [B, 1, 1, S]."""
        decoder: Any = self.model
        self.attend_without_mask()
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = decoder.rotary_emb(hidden, positions)
        wide = None if mask is None else mask.expand(-1, 1, hidden.shape[1], -1)
        for layer in layers:
            hidden = run(layer, hidden, wide, positions, rotary, causal)
        return hidden, rotary

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., vocab] of hidden states [..., dim]; the released code also converts to float32."""
        return self.lm_head(hidden).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        """Move and cast like any module, but keep rotary frequencies in float32: bfloat16 would blur positions."""
        kept = {k: v for k, v in self.named_buffers() if v.is_floating_point() and v.device.type != "meta"}
        super()._apply(fn, recurse)
        for key, value in kept.items():
            parent, _, name = key.rpartition(".")
            module = self.get_submodule(parent)
            module._buffers[name] = value.to(module._buffers[name].device)  # type: ignore[union-attr]
        return self


def _transformers_config(architecture: dict[str, Any]) -> PretrainedConfig:
    fields = {k: v for k, v in architecture.items() if k not in _NOT_ARCHITECTURE}
    try:
        config = AutoConfig.for_model(architecture["model_type"], **fields)
    except KeyError:
        raise ValueError(f"an LLM architecture needs `model_type`; got {list(architecture)}") from None
    config._attn_implementation = "sdpa"
    return config


def _load_pretrained(decoder: nn.Module, name: str) -> None:
    """Load the weights of `name` into `decoder`; if its embedding has fewer rows, the other rows are not changed."""
    check_source(name)
    try:
        source = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except OSError as error:
        raise OSError(
            f"cannot load the language model {name!r}: {str(error).splitlines()[0]}\n"
            "Give a local folder (model.llm.name=/path/to/folder), or start from a whole VLA with model.init_from=..."
        ) from error
    state = source.state_dict()
    initial = decoder.state_dict()
    for key, value in state.items():
        if key in initial and initial[key].shape != value.shape and initial[key].shape[1:] == value.shape[1:]:
            rows = min(len(value), len(initial[key]))
            state[key] = torch.cat([value[:rows], initial[key][rows:]])
    decoder.load_state_dict(state)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, N, vocab] against ids [B, N], over labelled tokens only."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
