"""Constrained FAST sequences spell whole chunks, whatever the model wants to say."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from test_fast_tokenizer import folders, motion
from tiny_parts import LLAMA
from torch import Tensor

from openvla_lightning.action_head.fast_decoding import ArrivalCounter, FastGrammar, write_fast_tokens
from openvla_lightning.action_head.fast_tokenizer import FastTokenizer
from openvla_lightning.model.llm import CausalLM


def walk(grammar: FastGrammar, coefficients: int, rows: int, seed: int) -> list[list[int]]:
    """Random sequences that the grammar allows, drawn as an untrained model would draw them."""
    generator = torch.Generator().manual_seed(seed)
    state, remaining = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), coefficients)
    sequences: list[list[int]] = [[] for _ in range(rows)]
    for _ in range(4 * coefficients):
        going = remaining > 0
        if not going.any():
            return sequences
        allowed = grammar.allowed(state, remaining)
        assert torch.equal(allowed.any(1), going), "a sequence is never stuck, and ends exactly when the chunk is whole"
        ids = torch.multinomial(torch.where(going[:, None], allowed, True).float(), 1, generator=generator)[:, 0]
        for sequence, index, more in zip(sequences, ids.tolist(), going.tolist(), strict=True):
            if more:
                sequence.append(index)
        moved = grammar.step(state, remaining, ids)
        state, remaining = (torch.where(going, new, old) for new, old in zip(moved, (state, remaining), strict=True))
    raise AssertionError("no end")


@pytest.mark.parametrize(
    ("scale", "alphabet"),
    [(10, "complete"), (50, "complete"), (50, "released"), (600, "complete")],
    ids=["one byte", "two bytes", "bytes that only begin longer characters", "three bytes"],
)
def test_whatever_the_grammar_allows_is_a_chunk(scale: int, alphabet: Literal["complete", "released"]) -> None:
    tokenizer = FastTokenizer.fit(motion(200), vocab_size=600, scale=scale, alphabet=alphabet)
    sequences = walk(grammar := FastGrammar(tokenizer), 56, 40, seed=scale)
    assert max(map(len, sequences)) <= 56 * grammar.most_ids
    chunks, arrivals = tokenizer.decode(sequences, 8, 7)
    assert not [arrival.problem for arrival in arrivals if arrival.problem]
    assert np.isfinite(chunks).all()


@pytest.mark.golden
def test_golden_sequences_are_allowed(golden: Path) -> None:
    for folder in folders(golden):
        tokens = json.loads((folder / "tokens.json").read_text())
        _, horizon, dim = np.load(folder / "golden.npz")["chunks"].shape
        tokenizer = FastTokenizer.read(folder, unwritable="drop")
        grammar = FastGrammar(tokenizer)
        limit = tokenizer.max_token - tokenizer.min_token
        for ids, chars in zip(tokens["token_ids"], tokens["chars_decoded"], strict=True):
            state, remaining = torch.zeros(1, dtype=torch.int64), torch.tensor([horizon * dim])
            fine = []
            for index in ids:
                fine.append(bool(grammar.allowed(state, remaining)[0, index]))
                state, remaining = grammar.step(state, remaining, torch.tensor([index]))
            at_the_end = state.item() == 0 and remaining.item() == 0
            assert (all(fine) and at_the_end) == (len(chars) == horizon * dim and max(chars) <= limit)


def prompts(llm: CausalLM, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(3, 9, (rows,), generator=generator)
    return torch.randn(rows, 9, llm.dim, generator=generator), lengths


@pytest.fixture(scope="module")
def llm() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM("tiny", {**LLAMA, "initializer_range": 0.5}, 768).eval()


def test_a_model_that_knows_nothing_writes_whole_chunks(llm: CausalLM) -> None:
    tokenizer = FastTokenizer.fit(motion(), vocab_size=256)
    first, grammar = llm.vocab_size - tokenizer.vocab_size, FastGrammar(tokenizer)
    embeddings, lengths = prompts(llm, 5)
    written = write_fast_tokens(llm, embeddings, lengths, 8 * 7, first, 2, grammar)
    assert len({tuple(ids) for ids in written}) > 3, "the rows should differ, or this shows nothing"
    said: list[str] = []
    counter = ArrivalCounter(tokenizer, said.append)
    counter(written, 8, 7)
    assert (counter.chunks, counter.broken, said) == (5, 0, [])
    for row, length in enumerate(lengths.tolist()):  # in a batch as alone
        alone = write_fast_tokens(llm, embeddings[row : row + 1, :length], None, 8 * 7, first, 2, grammar)
        assert alone == [written[row]]
    drawn = [
        write_fast_tokens(llm, embeddings, lengths, 56, first, 2, grammar, 1.0, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    counter(drawn[2], 8, 7)
    assert counter.broken == 0


def test_without_the_grammar_broken_sequences_are_counted_and_told(llm: CausalLM) -> None:
    tokenizer = FastTokenizer.fit(motion(), vocab_size=256)
    embeddings, lengths = prompts(llm, 5)
    written = write_fast_tokens(llm, embeddings, lengths, 56, 512, 2, None)
    said: list[str] = []
    counter = ArrivalCounter(tokenizer, said.append)
    chunks = counter(written, 8, 7)
    assert counter.broken > 0
    assert len(said) == counter.broken.bit_length()
    assert f"of {counter.chunks} sequences spelt no whole chunk" in said[-1]
    assert np.isfinite(chunks).all()
