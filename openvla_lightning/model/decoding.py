"""Writing ids after prompts, step by step: the reference against which `StaticDecoder` is tested.

It does not use transformers' `generate()`, because versions >= 4.50 silently drop the released model's image there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from openvla_lightning.model.llm import CausalLM


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an id is chosen from logits.

    Args:
        temperature: 0 takes the most likely id; above 0, ids are sampled from softmax(logits / temperature).
        top_k: sample among this many most likely ids; None: among all.
        within: the first id that may be chosen and the one after the last, for example the action ids; None: the whole
            vocabulary, as released. This changes the result only when the most likely id is outside the range.

    Raises:
        ValueError: for a negative temperature, fewer than one id, or an empty range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    within: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is below 0; 0 takes the most likely id")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} leaves nothing to choose from; null draws among all ids")
        if self.within is not None and not 0 <= self.within[0] < self.within[1]:
            raise ValueError(f"within={self.within} holds no id; give the first and the one after the last")

    def noise(self, llm: CausalLM, batch: int, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Gumbel noise [B, count, ids], on the CPU, with which taking the maximum samples; None at temperature 0.

        All of it is drawn before the first step, so that a replayed graph uses new noise.
        """
        if self.temperature == 0:
            return None
        ids = llm.lm_head.weight.shape[0] if self.within is None else self.within[1] - self.within[0]
        return torch.empty(batch, count, ids).exponential_(generator=generator).log_().neg_()

    def ids(self, llm: CausalLM, hidden: Tensor, noise: Tensor | None) -> Tensor:
        """Chosen ids [B] after hidden states [B, dim], with this step's noise [B, ids]."""
        logits = self._logits(llm, hidden)
        if noise is not None:
            logits = logits / self.temperature
            if self.top_k is not None and self.top_k < logits.shape[-1]:
                logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
            logits = logits + noise
        chosen = logits.argmax(-1)
        return chosen if self.within is None else chosen + self.within[0]

    def _logits(self, llm: CausalLM, hidden: Tensor) -> Tensor:
        if self.within is None:
            return llm.logits(hidden)
        rows, head = slice(*self.within), llm.lm_head
        if type(head) is nn.Linear and type(head.weight) is nn.Parameter:  # neither adapted nor quantised
            bias = None if head.bias is None else head.bias[rows]
            return nn.functional.linear(hidden, head.weight[rows], bias).float()
        return llm.logits(hidden)[:, rows]


MOST_LIKELY = Sampling()
"""As released: the most likely id of the whole vocabulary."""


def decode(
    llm: CausalLM,
    embeddings: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    choice: Sampling = MOST_LIKELY,
    noise: Tensor | None = None,
) -> Tensor:
    """Return a continuation, ids [B, max_new_tokens]; an end token does not stop it.

    Args:
        embeddings: prompt embeddings [B, S, dim], visual tokens included, padding on the right.
        lengths: int64 [B], positions of each row that are not padding; None when there is no padding.
        max_new_tokens: how many ids to write.
        choice: how an id is chosen.
        noise: [B, max_new_tokens, ids], from `choice.noise`.
    """
    batch, width, _ = embeddings.shape
    device = embeddings.device
    draws = [None] * max_new_tokens if noise is None else noise.to(device).unbind(1)
    cache = DynamicCache(config=llm.model.config)
    hidden = llm.decode(embeddings, cache=cache)
    if lengths is None:
        last, mask = hidden[:, -1], None
        lengths = torch.full((batch,), width, device=device)
    else:
        last = hidden[torch.arange(batch, device=device), lengths - 1]
        mask = torch.arange(width, device=device) < lengths[:, None]
    ids = [choice.ids(llm, last, draws[0])]
    for step in range(max_new_tokens - 1):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        hidden = llm.decode(
            llm.embed(ids[-1][:, None]), attention_mask=mask, position_ids=(lengths + step)[:, None], cache=cache
        )
        ids.append(choice.ids(llm, hidden[:, -1], draws[step + 1]))
    return torch.stack(ids, dim=1)
