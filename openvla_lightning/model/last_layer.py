"""The last decoder layer at the places that are read, and nowhere else."""

import sys
from types import MethodType
from typing import Any

from torch import Tensor, nn

from openvla_lightning.model.positions import at

READS_ALONE = ("llama", "mistral", "qwen2")
"""`model_type`s whose layer is attention and then an MLP, which `read_places` computes one after the other."""
READ_PLACES = "read_places"
"""The method that `add_read_places` gives a layer; sharded weights must be gathered for it as for `forward`."""


class _KeysValues:
    """Keys and values of all positions for the queries of a few; what attention calls its cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The keys and values [B, heads, S, head_dim] to attend to, whatever those of the few are."""
        return self.keys, self.values


def add_read_places(layer: nn.Module) -> None:
    """Make `read_places` a method of a decoder layer."""
    setattr(layer, READ_PLACES, MethodType(read_places, layer))


def read_places(layer: Any, hidden: Tensor, mask: Tensor | None, rotary: Any, places: Tensor) -> Tensor:
    """The layer's output [B, K, dim] at `places` alone; of other positions it computes only keys and values.

    Args:
        layer: of a family in `READS_ALONE`, with the attention `attention.CAUSAL`.
        hidden: [B, S, dim].
        mask: bool [B, 1, K or 1, S], the positions that each place sees; None: all.
        rotary: cosines and sines [1, S, head_dim] of the positions.
        places: int64 [B, K].
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    keys, values = (project(normed).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    _, keys = turn(keys, keys, *rotary)
    rotary_at_places = tuple(at(wave.expand(len(hidden), -1, -1), places) for wave in rotary)
    few = at(hidden, places)
    attended, _ = attention(
        hidden_states=layer.input_layernorm(few),
        position_embeddings=rotary_at_places,
        attention_mask=None if mask is None else mask.expand(-1, 1, places.shape[1], -1),
        past_key_values=_KeysValues(keys, values),
        is_causal=False,
    )
    few = few + attended
    return few + layer.mlp(layer.post_attention_layernorm(few))
