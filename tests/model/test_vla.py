"""How the model behaves whatever its weights."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.load import check_image_matters
from openvla_lightning.model import VLA
from openvla_lightning.types import IGNORE_INDEX


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, padded on the left."""
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        ids[row, -length:] = batch["input_ids"][row, :length]
        mask[row, -length:] = True
    return {**batch, "input_ids": ids, "attention_mask": mask}


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    length = int(batch["attention_mask"][row].sum())
    return {
        "pixel_values": batch["pixel_values"][row : row + 1],
        "input_ids": batch["input_ids"][row : row + 1, :length],
    }


def test_a_batch_of_any_padding_answers_as_each_row_alone(vla: VLA, batch: dict[str, Tensor]) -> None:
    expected = torch.cat([vla.generate(**alone(batch, row)) for row in range(3)])
    assert len({tuple(row) for row in expected.tolist()}) == 3, "the rows should differ, or this shows nothing"
    assert torch.equal(vla.generate(**batch), expected)
    assert torch.equal(vla.generate(**left_padded(batch)), expected)


def test_padding_changes_no_logits(vla: VLA, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        right, left = vla(**batch), vla(**left_padded(batch))
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            width = length + right.num_patches
            single = vla(**alone(batch, row)).logits[0]
            torch.testing.assert_close(right.logits[row, :width], single, atol=1e-4, rtol=0)
            torch.testing.assert_close(left.logits[row, -width:], single, atol=1e-4, rtol=0)


def test_padding_side_changes_no_loss(vla: VLA, batch: dict[str, Tensor]) -> None:
    labels = batch["input_ids"].masked_fill(~batch["attention_mask"], IGNORE_INDEX)
    left = left_padded(batch)
    left_labels = left["input_ids"].masked_fill(~left["attention_mask"], IGNORE_INDEX)
    with torch.no_grad():
        torch.testing.assert_close(vla(**batch, labels=labels).loss, vla(**left, labels=left_labels).loss)


def test_cached_decoding_is_the_argmax_of_whole_passes(vla: VLA, batch: dict[str, Tensor]) -> None:
    sample = alone(batch, 0)
    ids = vla.generate(**sample, max_new_tokens=5)
    with torch.no_grad():
        text = sample["input_ids"]
        for step in range(5):
            logits = vla(pixel_values=sample["pixel_values"], input_ids=text).logits[:, -1]
            assert logits.argmax(-1) == ids[0, step]
            text = torch.cat([text, ids[:, step : step + 1]], dim=1)


def test_black_and_white_images_give_other_logits(vla: VLA, batch: dict[str, Tensor]) -> None:
    pixels = torch.cat([torch.full((1, 6, 56, 56), value) for value in (-1.0, 1.0)])
    with torch.no_grad():
        black, white = vla(pixel_values=pixels, input_ids=batch["input_ids"][:1].expand(2, -1)).logits
    assert not torch.equal(black[-1], white[-1])
    check_image_matters(vla)


def test_the_guard_refuses_a_model_that_is_blind(config: dict[str, Any], build: Callable[..., VLA]) -> None:
    vla = build(config)
    with torch.no_grad():
        vla.projector.fc3.weight.zero_()
    with pytest.raises(CheckpointError, match="does not reach"):
        check_image_matters(vla)


def test_config_rebuilds_the_same_model(vla: VLA) -> None:
    config = json.loads(json.dumps(vla.config))
    again = VLA.from_config(config)
    assert again.config == vla.config
    assert list(again.state_dict()) == list(vla.state_dict())
    again.load_state_dict(vla.state_dict())


@pytest.mark.parametrize("kind", ["linear", "mlp", "fused_mlp", "perceiver"])
@pytest.mark.parametrize("fusion", ["channel", "sequence"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_variants_learn(config: dict[str, Any], batch: dict[str, Tensor], kind: str, fusion: str, layer: int) -> None:
    config["projector"]["kind"] = kind
    config["vision_backbone"] |= {"fusion": fusion, "feature_layer": layer}
    vla = VLA.from_config(config)
    output = vla(**batch, labels=batch["input_ids"])
    assert output.num_patches == (64 if kind == "perceiver" else 16 if fusion == "channel" else 32)
    assert output.logits.shape == (3, 9 + output.num_patches, 832)
    output.loss.backward()
    assert all(p.grad is not None for p in vla.projector.parameters())


def test_parts_cover_the_model_and_unknown_ones_are_named(vla: VLA) -> None:
    parts = [module for name in ("vision_backbone", "projector", "llm") for module in vla.part(name)]
    assert sum(p.numel() for m in parts for p in m.parameters()) == sum(p.numel() for p in vla.parameters())
    assert vla.part("llm.last_layer") == [vla.llm.model.layers[-1]]
    with pytest.raises(KeyError, match=r"llm\.last_layer"):
        vla.part("decoder")


def test_pixels_of_another_size_or_channel_count_are_refused(vla: VLA, batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 6, 56, 56\]"):
        vla(pixel_values=torch.zeros(3, 3, 56, 56), input_ids=batch["input_ids"])


def test_casting_keeps_rotary_frequencies_exact(config: dict[str, Any], build: Callable[..., VLA]) -> None:
    vla = build(config)
    before = vla.llm.model.rotary_emb.inv_freq.clone()
    vla.to(torch.bfloat16)
    assert vla.llm.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(vla.llm.model.rotary_emb.inv_freq, before)
    assert vla.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert vla.generate(pixel_values=torch.zeros(1, 6, 56, 56), input_ids=torch.ones(1, 3, dtype=torch.long)).shape == (
        1,
        7,
    )


def test_tied_embeddings_stay_tied(config: dict[str, Any], batch: dict[str, Tensor]) -> None:
    config["llm"]["architecture"] |= {"model_type": "qwen2", "tie_word_embeddings": True}
    vla = VLA.from_config(config)
    assert vla.llm.lm_head.weight is vla.llm.model.embed_tokens.weight
    vla(**batch, labels=batch["input_ids"]).loss.backward()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi"])
def test_every_family_decodes(config: dict[str, Any], batch: dict[str, Tensor], model_type: str) -> None:
    config["llm"]["architecture"]["model_type"] = model_type
    vla = VLA.from_config(config).eval()
    expected = torch.cat([vla.generate(**alone(batch, row)) for row in range(3)])
    assert torch.equal(vla.generate(**left_padded(batch)), expected)


def test_smooth_actions_start_with_neighbours_alike(config: dict[str, Any]) -> None:
    rows = VLA.from_config(config).llm.lm_head.weight[512:768].detach()
    config["llm"]["smooth_actions"] = 256
    vla = VLA.from_config(config)
    smooth = vla.llm.lm_head.weight[512:768].detach()
    assert torch.equal(smooth, vla.llm.model.embed_tokens.weight[512:768])
    assert smooth.std() == pytest.approx(rows.std().item(), rel=0.2)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(smooth[1:], smooth[:-1]).min() > 0.99
    assert cosine(smooth[128:], smooth[:128]).abs().mean() < 0.5
    assert cosine(rows[1:], rows[:-1]).abs().mean() < 0.5
    with torch.device("meta"):
        assert VLA.from_config(vla.config).config == vla.config
