"""Parallel decoding writes what greedy decoding writes, whatever the guess, in fewer passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_decoding import ACTIONS, floats, plainly, prompts

from openvla_lightning.model import VLA
from openvla_lightning.model.decoding import Sampling
from openvla_lightning.model.jacobi_decoding import JacobiDecoder, decode_in_parallel
from openvla_lightning.types import Inputs


def in_parallel(vla: VLA, given: dict[str, torch.Tensor], count: int = 7, **options: Any) -> tuple[torch.Tensor, int]:
    with torch.inference_mode():
        pixels = floats(given["pixels"])
        embeddings, prefix = vla.prompt(pixels, given["input_ids"], given["attention_mask"], None)
        lengths = given["attention_mask"].sum(1) + prefix.shape[1]
        alike = bool(given["attention_mask"].all())
        ids, passes, _ = decode_in_parallel(vla.llm, embeddings, None if alike else lengths, count, **options)
        return ids, passes


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("within", [None, ACTIONS])
def test_the_ids_are_those_of_greedy_decoding(
    config: dict[str, Any], build: Callable[..., VLA], rows: int, within: tuple[int, int] | None
) -> None:
    vla, choice, generator = build(config), Sampling(within=within), torch.Generator().manual_seed(0)
    seen = set()
    for trial in range(5):
        given = prompts(rows + 8 * trial) if trial else prompts(rows)
        given = {name: tensor[:rows] for name, tensor in given.items()}
        expected = plainly(vla, given, choice=choice)
        drafts = {
            "none": None,
            "right": expected,
            "random": torch.randint(0, 768, expected.shape, generator=generator),
            "half right": torch.where(torch.rand(expected.shape, generator=generator) < 0.5, expected, 5),
            "late": torch.cat([expected[:, 1:], expected[:, :1]], dim=1),
        }
        for name, draft in drafts.items():
            ids, passes = in_parallel(vla, given, choice=choice, draft=draft)
            assert torch.equal(ids, expected), (trial, name)
            seen.add((name, passes))
    assert all(passes <= 9 for _, passes in seen), "a wrong guess costs passes, but not without end"
    assert ("right", 1) in seen, "a right guess is verified in one pass"


def test_ties_are_decided_as_greedy_decoding_decides_them(config: dict[str, Any], build: Callable[..., VLA]) -> None:
    vla = build(config)
    with torch.no_grad():  # each odd id is as likely as the even one before it
        vla.llm.lm_head.weight[1::2] = vla.llm.lm_head.weight[::2]
    given = prompts(6)
    expected = plainly(vla, given)
    for draft in (None, expected, expected + 1):
        ids, passes = in_parallel(vla, given, draft=draft)
        assert torch.equal(ids, expected)
        assert passes <= 15


@pytest.mark.parametrize("count", [1, 2])
def test_few_ids(config: dict[str, Any], build: Callable[..., VLA], count: int) -> None:
    vla, given = build(config), prompts(4)
    expected = plainly(vla, given, max_new_tokens=count)
    for draft in (None, expected):
        ids, _ = in_parallel(vla, given, count, draft=draft)
        assert torch.equal(ids, expected)


def test_the_action_before_is_the_first_guess(config: dict[str, Any], build: Callable[..., VLA]) -> None:
    vla = build(config)
    decoder = JacobiDecoder(vla, floats)
    for rows in (3, 3, 2, 3):
        given = prompts(rows)
        inputs = Inputs(
            pixel_values=given["pixels"],
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            places=torch.zeros(rows, 0, dtype=torch.int64),
        )
        before = decoder.passes
        assert torch.equal(decoder(inputs), plainly(vla, given))
        if decoder.actions == 2:
            assert decoder.passes - before == 1, "the same scene again needs one pass"
    assert decoder.actions == 4


def test_draws_cannot_be_guessed(config: dict[str, Any], build: Callable[..., VLA]) -> None:
    with pytest.raises(ValueError, match="set temperature=0"):
        in_parallel(build(config), prompts(1), choice=Sampling(temperature=1.0))
