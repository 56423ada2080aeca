"""The static decoder writes what the plain one writes, whatever the model, the padding and the way of choosing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_vla import left_padded
from torch import Tensor

from openvla_lightning.model import VLA
from openvla_lightning.model.decoding import Sampling
from openvla_lightning.model.static_decoding import StaticDecoder
from openvla_lightning.quantisation import Quantisation
from openvla_lightning.strategy import LoRA
from openvla_lightning.types import Inputs

ACTIONS = (512, 768)


def floats(pixels: Tensor) -> Tensor:
    """Stands for `ImageTransform.normalise`, for two towers."""
    return (pixels.float() / 64 - 2).repeat(1, 2, 1, 1)


def prompts(rows: int = 3) -> dict[str, Tensor]:
    """Pictures, and prompts of different length padded on the right."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(3, 12, (rows,), generator=generator)
    mask = torch.arange(11) < lengths[:, None]
    ids = torch.randint(260, 512, (rows, 11), generator=generator)
    ids[:, 0] = 1
    pixels = torch.randint(0, 256, (rows, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return {"pixels": pixels, "input_ids": ids.where(mask, 0), "attention_mask": mask}


def of(given: dict[str, Tensor]) -> Inputs:
    """As a processor would hand them over."""
    ids = given["input_ids"]
    return Inputs(
        pixel_values=given["pixels"], input_ids=ids, attention_mask=given["attention_mask"], places=ids[:, :0]
    )


def plainly(vla: VLA, given: dict[str, Tensor], **choice: Any) -> Tensor:
    pixel_values = floats(given["pixels"])
    return vla.generate(
        pixel_values=pixel_values, input_ids=given["input_ids"], attention_mask=given["attention_mask"], **choice
    )


def adapted(vla: VLA) -> VLA:
    LoRA(rank=4).apply(vla)
    with torch.no_grad():
        for name, parameter in vla.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.3)
    return vla.eval()


MODELS: dict[str, Callable[[VLA], VLA]] = {
    "plain": lambda vla: vla,
    "adapted": adapted,
    "int8": Quantisation(8),
    "int4": Quantisation(4),
    "int4, adapted": lambda vla: adapted(Quantisation(4)(vla)),
}


@pytest.fixture
def config(config: dict[str, Any]) -> dict[str, Any]:
    """Widths that 4-bit blocks divide."""
    config["vision_backbone"]["towers"]["dino"]["embed_dim"] = 32
    config["llm"]["architecture"] |= {"hidden_size": 64, "intermediate_size": 128}
    return config


def same(vla: VLA, given: dict[str, Tensor], found: Tensor, expected: Tensor) -> bool:
    """Whether the ids are equal. In 8 bits, the rounding of activations may tip one row where two ids nearly tie."""
    differ = (found != expected).any(1).nonzero().flatten().tolist()
    if vla.quantisation != Quantisation(8).config or len(differ) > 1:
        return not differ
    for row in differ:
        place = int((found[row] != expected[row]).nonzero()[0])
        ids = torch.cat([given["input_ids"][row][given["attention_mask"][row]], expected[row, :place]])[None]
        seen = {"pixel_values": floats(given["pixels"][row : row + 1]), "input_ids": ids}
        with torch.no_grad():
            logits = vla(**seen, attention_mask=torch.ones_like(ids)).logits[0, -1]
        if (logits[found[row, place]] - logits[expected[row, place]]).abs() > 0.1 * logits.std():
            return False
    return True


@pytest.mark.parametrize("kind", MODELS)
def test_it_writes_what_the_plain_way_writes(config: dict[str, Any], build: Callable[..., VLA], kind: str) -> None:
    vla = MODELS[kind](build(config))
    given = prompts(8)
    expected = plainly(vla, given)
    assert len(torch.unique(expected, dim=0)) > 4, "the rows should differ, or this shows nothing"
    decoder = StaticDecoder(vla, floats)
    assert same(vla, given, decoder(of(given)), expected)
    left = left_padded(given)
    assert same(vla, given, decoder(of(left)), expected)
    singles = [{name: tensor[row : row + 1] for name, tensor in left.items()} for row in range(8)]
    alone = torch.cat([decoder(of(single)) for single in singles])
    assert same(vla, given, alone, torch.cat([plainly(vla, single) for single in singles]))
    if kind != "int8":  # which looks for outliers in the whole batch
        assert torch.equal(alone, expected)


def test_one_tower_is_enough(config: dict[str, Any], build: Callable[..., VLA]) -> None:
    del config["vision_backbone"]["towers"]["dino"]
    config["projector"]["kind"] = "mlp"
    vla, given = build(config), prompts()
    ids = vla.generate(
        pixel_values=floats(given["pixels"])[:, :3],
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
    )
    assert torch.equal(StaticDecoder(vla, lambda pixels: floats(pixels)[:, :3])(of(given)), ids)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "mistral"},
        {"model_type": "qwen2", "num_key_value_heads": 2},
        {"model_type": "phi"},
        {"model_type": "gemma"},  # scales its embeddings outside of its layers: goes the plain way
    ],
    ids=lambda architecture: architecture["model_type"],
)
def test_every_family_decodes(config: dict[str, Any], build: Callable[..., VLA], architecture: dict[str, Any]) -> None:
    config["llm"]["architecture"] |= {"head_dim": 16} | architecture
    vla, given = build(config), prompts()
    assert torch.equal(StaticDecoder(vla, floats)(of(given)), plainly(vla, given))


@pytest.mark.slow
def test_compiled_it_writes_the_same(config: dict[str, Any], build: Callable[..., VLA]) -> None:
    vla = build(config)
    decoder = StaticDecoder(vla, floats, compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for rows in (3, 4):  # one shape: three rows are padded to four
        assert torch.equal(decoder(of(prompts(rows))), plainly(vla, prompts(rows)))
    # the prompt, and the ids after it: each for all layers and steps at once
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_cannot_be_captured_is_run(
    vla: VLA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: StaticDecoder, action: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(StaticDecoder, "_capture", fail)
    decoder = StaticDecoder(vla, floats, graph=True)
    for _ in range(2):
        assert torch.equal(decoder(of(prompts(3))), plainly(vla, prompts(3)))
    assert [record.getMessage() for record in caplog.records] == [
        "No CUDA graphs, so actions take longer: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_the_restricted_head_is_the_whole_one_where_that_chooses_actions(
    config: dict[str, Any], build: Callable[..., VLA], kind: str
) -> None:
    vla, given = MODELS[kind](build(config)), prompts(8)
    choice = Sampling(within=ACTIONS)
    ids = plainly(vla, given, choice=choice)
    assert torch.equal(StaticDecoder(vla, floats, choice)(of(given)), ids)
    assert ((ids >= 512) & (ids < 768)).all()
    whole = plainly(vla, given)
    assert (whole != ids).any(), "an untrained model chooses other words, too"
    agree = ((whole >= 512) & (whole < 768)).int().cumprod(dim=1).bool()
    assert agree.any()
    assert torch.equal(whole[agree], ids[agree])


@pytest.mark.parametrize("within", [None, ACTIONS])
def test_drawing_follows_the_seed(config: dict[str, Any], build: Callable[..., VLA], within: Any) -> None:
    vla, given = build(config), prompts(8)
    choice = Sampling(temperature=0.7, top_k=20, within=within)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    expected = plainly(vla, given, choice=choice, generator=seeded(1))
    decoder = StaticDecoder(vla, floats, choice)
    assert torch.equal(decoder(of(given), generator=seeded(1)), expected)
    assert (decoder(of(given), generator=seeded(2)) != expected).any()
    one = StaticDecoder(vla, floats, Sampling(temperature=0.7, top_k=1))(of(given), generator=seeded(3))
    assert torch.equal(one, plainly(vla, given)), "the most likely of one is the most likely"


def test_draws_have_the_models_probabilities(vla: VLA) -> None:
    hidden = torch.randn(1, vla.llm.dim, generator=torch.Generator().manual_seed(0)).expand(20_000, -1)
    choice = Sampling(temperature=2.0, top_k=3, within=(512, 520))
    noise = choice.noise(vla.llm, len(hidden), 1, torch.Generator().manual_seed(0))
    assert noise is not None
    drawn = choice.ids(vla.llm, hidden, noise[:, 0])
    shares = torch.bincount(drawn - 512, minlength=8) / len(drawn)
    logits = vla.llm.logits(hidden[0])[512:520] / 2
    expected = logits.masked_fill(logits < logits.topk(3).values[-1], -torch.inf).softmax(0)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


def test_stages_are_clocked_in_order(vla: VLA) -> None:
    heard: list[str] = []
    StaticDecoder(vla, floats)(of(prompts()), clock=heard.append)
    assert heard == ["copy", "vision", "prefill", "decode"]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"within": (5, 5)}])
def test_mistakes_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
