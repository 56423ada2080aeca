"""Writing FAST tokens after a prompt so that they always encode a complete chunk."""

import logging
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from openvla_lightning.action_head.fast_tokenizer import FastTokenizer
from openvla_lightning.model.llm import CausalLM

log = logging.getLogger(__name__)


class FastGrammar:
    """The ids that may follow, so that a sequence has exactly as many coefficients as a chunk, all in range.

    Coefficients are characters. A character may have several bytes, which different ids may write. So the state of a
    sequence is the number of missing characters, and the bytes of an incomplete character. These must begin a character
    that the vocabulary can write, so a sequence is never stuck. Everything is in tables, for whole batches at once.

    Args:
        tokenizer: the tokenizer of the ids.

    Attributes:
        characters: int64 [states, ids], how many characters an id completes in a state; -1 if it is not allowed there.
        after: int64 [states, ids], the next state. State 0 is between characters.
        most_ids: largest number of ids that write one coefficient.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        whole = set(tokenizer.characters)
        begun = {raw[:length] for raw in whole for length in range(1, len(raw))}
        states = [b""]
        characters, after = [], []
        for state in states:  # the list grows, so each reachable state is visited once
            moves = [_walk(state, raw, whole, begun) for raw in tokenizer.bytes_of_ids]
            states += sorted({move[1] for move in moves if move is not None} - set(states))
            characters.append([-1 if move is None else move[0] for move in moves])
            after.append([0 if move is None else states.index(move[1]) for move in moves])
        self.most_ids = max(map(len, whole))
        self.characters, self.after = torch.tensor(characters), torch.tensor(after)

    def to(self, device: torch.device) -> "FastGrammar":
        """Move the tables, and return this."""
        self.characters, self.after = self.characters.to(device), self.after.to(device)
        return self

    def allowed(self, state: Tensor, remaining: Tensor) -> Tensor:
        """Which ids may follow, bool [B, ids]; none if a sequence is complete.

        Args:
            state: int64 [B].
            remaining: int64 [B], missing characters.
        """
        characters = self.characters[state]
        return (characters >= 0) & (characters + (self.after[state] > 0) <= remaining[:, None])

    def step(self, state: Tensor, remaining: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """State and remaining characters after allowed ids [B]."""
        return self.after[state, ids], remaining - self.characters[state, ids]


def _walk(
    state: bytes, raw: bytes | None, whole: Collection[bytes], begun: Collection[bytes]
) -> tuple[int, bytes] | None:
    """Number of characters that bytes complete after those of `state`, and the bytes left; None if not allowed."""
    characters = 0
    for byte in raw or b"":
        state += bytes([byte])
        if state in whole:
            characters, state = characters + 1, b""
        elif state not in begun:
            return None
    return (characters, state) if raw else None


@torch.inference_mode()
def write_fast_tokens(
    llm: CausalLM,
    embeddings: Tensor,
    lengths: Tensor | None,
    coefficients: int,
    first_id: int,
    end: int,
    grammar: FastGrammar | None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The FAST ids that follow prompts, one sequence per row, without the end token.

    Args:
        llm: the language model.
        embeddings: prompts [B, S, dim], visual tokens included, padding on the right.
        lengths: int64 [B], positions that are no padding; None if there is no padding.
        coefficients: T * D, the number of coefficients in a chunk.
        first_id: the first FAST id in the vocabulary; the vocabulary's last id is FAST id 0.
        end: the end token's id, which ends a sequence without a grammar.
        grammar: allows only ids that lead to a complete chunk, and ends when it is complete. None: all ids are allowed,
            until the model writes the end token or twice as many ids as there are coefficients.
        temperature: 0 takes the most likely id; above 0, ids are sampled.
        generator: on the CPU, for sampling.
    """
    batch, width, _ = embeddings.shape
    device, last_id = embeddings.device, llm.vocab_size - 1
    cache = DynamicCache(config=llm.model.config)
    hidden = llm.decode(embeddings, cache=cache)
    mask = None if lengths is None else torch.arange(width, device=device) < lengths[:, None]
    ends = torch.full((batch,), width, device=device) if lengths is None else lengths
    last = hidden[torch.arange(batch, device=device), ends - 1]
    state = torch.zeros(batch, dtype=torch.int64, device=device)
    remaining = torch.full_like(state, coefficients)
    going = torch.ones(batch, dtype=torch.bool, device=device)
    sequences: list[list[int]] = [[] for _ in range(batch)]
    for step in range(coefficients * (2 if grammar is None else grammar.most_ids)):
        logits = llm.logits(last)
        if grammar is not None:
            logits = logits[:, first_id : last_id + 1].flip(1)
            logits = logits.masked_fill(~grammar.allowed(state, remaining), -torch.inf)
        if temperature:
            noise = torch.empty(logits.shape).exponential_(generator=generator).log_().neg_()
            logits = logits / temperature + noise.to(device)
        ids = logits.argmax(-1)
        if grammar is None:
            going = going & (ids != end)
            fast = last_id - ids
        else:
            fast, ids = ids, last_id - ids
        for row, (index, more) in enumerate(zip(fast.tolist(), going.tolist(), strict=True)):
            if more:
                sequences[row].append(index)
        if grammar is not None:
            moved = grammar.step(state, remaining, fast)
            state, remaining = (
                torch.where(going, new, old) for new, old in zip(moved, (state, remaining), strict=True)
            )
            going = going & (remaining > 0)
        if not bool(going.any()):
            break
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        positions = (ends + step)[:, None]
        hidden = llm.decode(llm.embed(ids[:, None]), attention_mask=mask, position_ids=positions, cache=cache)
        last = hidden[:, -1]
    return sequences


class ArrivalCounter:
    """Decodes sequences, and counts and reports the incomplete or impossible ones.

    Args:
        tokenizer: the tokenizer that decodes.
        say: called for the 1st, 2nd, 4th, 8th, ... such sequence; by default it logs a warning.

    Attributes:
        chunks, broken: number of all sequences, and of incomplete ones.
    """

    def __init__(self, tokenizer: FastTokenizer, say: Callable[[str], None] = log.warning) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.chunks = self.broken = 0

    def __call__(self, ids: Sequence[Sequence[int]], horizon: int, dim: int) -> NDArray[np.float64]:
        """Chunks [B, T, D] of sequences; see `FastTokenizer.decode`."""
        chunks, arrivals = self.tokenizer.decode(ids, horizon, dim)
        self.chunks += len(arrivals)
        for arrival in arrivals:
            if arrival.problem is not None:
                self.broken += 1
                if self.broken & (self.broken - 1) == 0:
                    self.say(
                        f"FAST: {self.broken} of {self.chunks} sequences spelt no whole chunk; of the last one "
                        f"{arrival.frequencies} of {horizon} frequencies are used ({arrival.problem})"
                    )
        return chunks
