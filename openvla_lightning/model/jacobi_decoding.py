"""The same ids as sequential decoding, in fewer passes: all ids are guessed at once and verified in one pass.

One pass over a guess predicts the id after each guessed one. Up to the first wrong guess, these predictions are right,
and so is the next one, because it follows only right ids. The later predictions are the next guess (Jacobi iteration,
Santilli et al. 2023). A bad guess costs more passes, but never changes the answer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from openvla_lightning.model.decoding import MOST_LIKELY, Sampling
from openvla_lightning.model.llm import CausalLM
from openvla_lightning.model.static_decoding import StaticDecoder
from openvla_lightning.types import Inputs

if TYPE_CHECKING:
    from openvla_lightning.model.vla import VLA


class JacobiDecoder:
    """Writes ids for inputs, as `StaticDecoder` does; the previous action is the guess for the next one.

    If robots change their rows in the batch, the guess gets worse, but the answer stays the same.

    Args:
        vla: the model, on its device and in `eval`.
        normalise: uint8 [B, 3V, H, W] -> float [B, 3 * towers * V, H, W] on any device (`ImageTransform.normalise`).
        choice: how ids are chosen.
        first: the id that fills the first guess.

    Attributes:
        actions, passes: number of calls, and total number of passes of the language model.
    """

    def __init__(
        self, vla: "VLA", normalise: Callable[[Tensor], Tensor], choice: Sampling = MOST_LIKELY, first: int = 0
    ) -> None:
        _check(choice)
        self.vla, self.normalise, self.choice, self.first = vla, normalise, choice, first
        self._stepwise = StaticDecoder(vla, normalise, choice)
        self.actions = self.passes = 0
        self._last: Tensor | None = None

    @torch.inference_mode()
    def __call__(
        self,
        inputs: Inputs,
        count: int = 7,
        generator: torch.Generator | None = None,
        clock: Callable[[str], None] = lambda stage: None,
    ) -> Tensor:
        """Ids [B, count] on the device; arguments as for `StaticDecoder`, with padding on the right."""
        alike = bool(inputs.attention_mask.all())
        device_inputs = inputs.to(next(self.vla.parameters()).device)
        clock("copy")
        pixels = self.normalise(device_inputs.pixel_values)
        embeddings, prefix = self.vla.prompt(
            pixels, device_inputs.input_ids, device_inputs.attention_mask, device_inputs.proprio
        )
        clock("vision")
        lengths = None if alike else device_inputs.attention_mask.long().sum(1) + prefix.shape[1]
        draft = self._last
        if draft is None or draft.shape != (len(inputs), count):
            draft = torch.full((len(inputs), count), self.first)
        ids, passes, tied = decode_in_parallel(self.vla.llm, embeddings, lengths, count, self.choice, draft)
        if tied:  # where rounding could change an id, use the sequential decoder
            ids, passes = self._stepwise(inputs, count), passes + count
        clock("decode")
        self._last, self.actions, self.passes = ids, self.actions + 1, self.passes + passes
        return ids.clone()


def decode_in_parallel(
    llm: CausalLM,
    embeddings: Tensor,
    lengths: Tensor | None,
    count: int,
    choice: Sampling = MOST_LIKELY,
    draft: Tensor | None = None,
) -> tuple[Tensor, int, bool]:
    """The ids [B, count] of `decode`, the number of passes, and whether rounding could have changed an id.

    A pass over many positions rounds differently from one over a single position. If the two most likely ids are so
    close that this could matter, a separate pass decides the id, as in `decode`.

    Args:
        embeddings: prompt embeddings [B, S, dim], visual tokens included, padding on the right.
        lengths: int64 [B], positions of each row that are not padding; None when there is no padding.
        count: how many ids to write.
        choice: how an id is chosen: the most likely one, of all or within a range.
        draft: the first guess, int64 [B, count], for example the ids of the previous action. None: no guess; the first
            pass reads only the prompt.

    Raises:
        ValueError: for a temperature above 0, because samples cannot be guessed.
    """
    _check(choice)
    batch, width, _ = embeddings.shape
    device = embeddings.device
    rows = torch.arange(batch, device=device)
    padded = lengths is not None
    ends = torch.full((batch,), width, device=device) if lengths is None else lengths
    prompt = torch.arange(width, device=device) < ends[:, None]
    cache = DynamicCache(config=llm.model.config)
    guess = torch.zeros(batch, count, dtype=torch.int64, device=device) if draft is None else draft.to(device).clone()
    right = torch.zeros(batch, dtype=torch.int64, device=device)  # number of verified ids in each row
    known, passes, alone, tied = 0, 0, draft is None, False
    while known < count:
        first = max(known - 1, 0)  # the first id that this pass reads
        last = known if alone else count - 1
        fed = llm.embed(guess[:, first:last])
        positions = ends[:, None] + torch.arange(first, last, device=device)
        if known == 0:
            fed = torch.cat([embeddings, fed.to(embeddings.dtype)], dim=1)
            positions = torch.cat([torch.arange(width, device=device).expand(batch, -1), positions], dim=1)
        elif (stale := width + first - cache.get_seq_length()) < 0:
            cache.crop(stale)
        mask = torch.cat([prompt, prompt.new_ones(batch, last)], dim=1) if padded else None
        hidden = llm.decode(fed, attention_mask=mask, position_ids=positions, cache=cache)
        if known == 0:
            hidden = torch.cat([hidden[rows, ends - 1][:, None], hidden[:, width:]], dim=1)
        passes += 1
        ids, sure = choose(llm, hidden, choice)
        ours = guess[:, known : known + ids.shape[1]]
        kept = torch.arange(known, known + ids.shape[1], device=device) < right[:, None]
        sure = sure | kept | alone
        # an id is right if it is sure and all guesses before it were right
        follows = ((ours == ids) | kept) & sure
        accepted = sure & nn.functional.pad(follows[:, :-1], (1, 0), value=True).cummin(dim=1).values
        guess[:, known : known + ids.shape[1]] = torch.where(kept, ours, ids)
        before, right = known, known + accepted.sum(dim=1)
        known = int(right.min())
        alone = known == before
        tied = tied or alone
    return guess, passes, tied


def _check(choice: Sampling) -> None:
    if choice.temperature:
        raise ValueError("parallel_exact writes the most likely ids: set temperature=0, or decoding=stepwise")


def choose(llm: CausalLM, hidden: Tensor, choice: Sampling) -> tuple[Tensor, Tensor]:
    """The most likely ids [B, N] after hidden states [B, N, dim], and where rounding could not change them."""
    logits = choice._logits(llm, hidden.flatten(0, 1))
    largest, second = logits.topk(2, dim=-1).values.unbind(-1)
    coarse = llm.lm_head.weight.dtype != torch.float32
    rounding = (largest.abs() / 128).clamp(min=0.125) if coarse else 1e-3  # a step of bfloat16 at this size
    ids = logits.argmax(-1).reshape(hidden.shape[:2])
    sure = (largest - second > rounding).reshape(hidden.shape[:2])
    return (ids if choice.within is None else ids + choice.within[0]), sure
