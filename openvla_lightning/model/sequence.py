"""What the language model reads, put together: text, visual tokens, further tokens; and where the padding is."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from openvla_lightning.model.vla import VLA
    from openvla_lightning.types import Inputs


def see(vla: "VLA", inputs: "Inputs", written: int) -> Tensor:
    """See `VLA.see`."""
    language = None
    if vla.film is not None:
        text = vla.llm.embed(inputs.input_ids)
        counted = inputs.attention_mask if vla.film == "masked" else torch.ones_like(inputs.input_ids)
        counted = counted.bool().scatter(1, inputs.places[:, :written] + 1, False)
        language = (text * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
    return vla.projector(vla.vision_backbone(inputs.pixel_values, language))


def build(
    vla: "VLA",
    inputs: "Inputs",
    slots: Tensor | None = None,
    extra: Tensor | None = None,
    visual: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Embeddings [B, S, dim] of the whole sequence, and how many stand between BOS and the other text.

    Arguments and errors are those of `VLA.states`.
    """
    text = vla.llm.embed(inputs.input_ids)
    if slots is not None:
        places = inputs.places[:, : slots.shape[1]] + 1
        rows = torch.arange(len(text), device=text.device)[:, None].expand_as(places)
        text = text.index_put((rows, places), slots.to(text.dtype))
    tokens = [see(vla, inputs, 0 if slots is None else slots.shape[1]) if visual is None else visual]
    if vla.proprio_dim is not None:
        tokens.append(_proprio_token(vla, inputs.proprio))
    tokens += [] if extra is None else [extra]
    prefix = torch.cat([token.to(text.dtype) for token in tokens], dim=1)
    return torch.cat([text[:, :1], prefix, text[:, 1:]], dim=1), prefix.shape[1]


def _proprio_token(vla: "VLA", proprio: Tensor | None) -> Tensor:
    if proprio is None or proprio.shape[-1] != vla.proprio_dim:
        got = "none" if proprio is None else f"{proprio.shape[-1]}"
        raise ValueError(f"this model reads {vla.proprio_dim} numbers of proprioception, it was given {got}")
    projector: Any = vla.proprio_projector
    return projector(proprio.to(projector.fc1.weight.dtype))[:, None]


def visible(attention_mask: Tensor | None, prefix: int) -> Tensor | None:
    """Which of BOS, `prefix` tokens and the other text [B, L + prefix] are no padding; None where all are, if known.

    A mask on an accelerator is taken to hide something: to look would be to wait for it.
    """
    if attention_mask is None or (attention_mask.device.type == "cpu" and bool(attention_mask.all())):
        return None
    mask = attention_mask.bool()
    return torch.cat([mask[:, :1].expand(-1, 1 + prefix), mask[:, 1:]], dim=1)


def at(hidden: Tensor, places: Tensor) -> Tensor:
    """The hidden states [B, K, dim] at `places` [B, K] of [B, S, dim]."""
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], places]


def left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """How many padding positions open each row [B], or None when no row opens with padding."""
    if attention_mask is None or bool(attention_mask[:, 0].all()):
        return None
    return attention_mask.int().argmax(dim=1)


def roll(rows: Tensor, shift: Tensor | None) -> Tensor:
    """Rotate each row [B, N, ...] to the left by its own `shift` [B]: left padding becomes right padding."""
    if shift is None:
        return rows
    index = (torch.arange(rows.shape[1], device=rows.device) + shift[:, None]) % rows.shape[1]
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]
