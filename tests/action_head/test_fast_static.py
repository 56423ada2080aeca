"""FAST tokens written with static shapes are those of the plain way, whatever the batch and its padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fast_tokenizer import motion
from torch import Tensor

from openvla_lightning.action_head.base import Acting
from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.fast_decoding import FastGrammar
from openvla_lightning.action_head.fast_static import StaticFastDecoder
from openvla_lightning.action_head.fast_tokenizer import FastTokenizer
from openvla_lightning.model import VLA
from openvla_lightning.types import Inputs

CHUNK, DIM = 4, 7


def floats(pixels: Tensor) -> Tensor:
    """Stands for `ImageTransform.normalise`, for two towers."""
    return (pixels.float() / 64 - 2).repeat(1, 2, 1, 1)


def robots(rows: int) -> Inputs:
    """Pictures, and prompts of different length padded on the right."""
    generator = torch.Generator().manual_seed(rows)
    mask = torch.arange(11) < torch.randint(3, 12, (rows,), generator=generator)[:, None]
    ids = torch.randint(260, 512, (rows, 11), generator=generator)
    ids[:, 0] = 1
    pixels = torch.randint(0, 256, (rows, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return Inputs(
        pixel_values=pixels, input_ids=ids.where(mask, 0), attention_mask=mask, places=torch.zeros(rows, 0).long()
    )


@pytest.fixture
def head() -> FastHead:
    return FastHead(FastTokenizer.fit(motion(), vocab_size=256).config, vocab_size=768, action_chunk=CHUNK)


@pytest.fixture
def vla(config: dict[str, Any], build: Callable[..., VLA]) -> VLA:
    """A model whose sequences differ."""
    vla = build(config).eval()
    with torch.no_grad():
        vla.llm.lm_head.weight.mul_(3.0)
    return vla


def test_the_static_way_writes_what_the_plain_way_writes(vla: VLA, head: FastHead) -> None:
    told: list[str] = []
    ways = [Acting(normalise=floats, static=static, clock=told.append) for static in (True, False)]
    fast, plain = (head.decoder(vla, way) for way in ways)
    chunks = []
    for rows in (1, 5, 3, 8):
        chunk = fast(robots(rows), DIM, None)
        assert told == ["copy", "vision", "prefill", "decode"]
        torch.testing.assert_close(chunk, plain(robots(rows), DIM, None), rtol=0, atol=0)
        chunks.append(chunk)
        told.clear()
    assert len(torch.cat(chunks).unique(dim=0)) > 8, "robots that act alike would show nothing"


def test_each_robot_stops_by_itself_and_compiled_shapes_change_nothing(vla: VLA, head: FastHead) -> None:
    decoder = StaticFastDecoder(vla, floats, head.first_id, FastGrammar(head.tokenizer))
    written = decoder.write(robots(8), CHUNK * DIM)
    assert len({len(ids) for ids in written}) > 1
    _, arrivals = head.tokenizer.decode(written, CHUNK, DIM)
    assert not [arrival.problem for arrival in arrivals if arrival.problem]
    decoder.compile = True  # padded batches and prompts, as graphs need them; the layer itself stays as it is
    assert decoder.write(robots(5), CHUNK * DIM) == StaticFastDecoder(
        vla, floats, head.first_id, FastGrammar(head.tokenizer)
    ).write(robots(5), CHUNK * DIM)


@pytest.mark.parametrize("options", [{"constrained": False}, {"temperature": 1.0}])
def test_other_ways_of_writing_go_the_plain_way(vla: VLA, head: FastHead, options: dict[str, Any]) -> None:
    decode = head.decoder(vla, Acting(normalise=floats, options=options))
    assert torch.isfinite(decode(robots(2), DIM, torch.Generator().manual_seed(0))).all()
