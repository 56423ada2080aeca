"""Greedy decoding with a key-value cache, written here because the image must never get lost on the way.

transformers >= 4.50 silently drops the released model's image inside `generate()`.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from openvla_lightning.model.llm import CausalLM


def greedy(llm: CausalLM, embeddings: Tensor, lengths: Tensor | None, max_new_tokens: int) -> Tensor:
    """Return the most likely continuation, ids [B, max_new_tokens]; no end token stops it early.

    Args:
        embeddings: prompt embeddings [B, S, dim], visual tokens included, padding on the right.
        lengths: int64 [B], positions of each row that are not padding; None when there is no padding.
        max_new_tokens: how many ids to write.
    """
    batch, width, _ = embeddings.shape
    device = embeddings.device
    cache = DynamicCache(config=llm.model.config)
    hidden = llm.decode(embeddings, cache=cache)
    if lengths is None:
        last, mask = hidden[:, -1], None
        lengths = torch.full((batch,), width, device=device)
    else:
        last = hidden[torch.arange(batch, device=device), lengths - 1]
        mask = torch.arange(width, device=device) < lengths[:, None]
    ids = [llm.logits(last).argmax(-1)]
    for step in range(max_new_tokens - 1):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        hidden = llm.decode(
            llm.embed(ids[-1][:, None]), attention_mask=mask, position_ids=(lengths + step)[:, None], cache=cache
        )
        ids.append(llm.logits(hidden[:, -1]).argmax(-1))
    return torch.stack(ids, dim=1)
