"""The head's three jobs agree with each other and with plain definitions."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openvla_lightning.action_head import TokenHead
from openvla_lightning.model import VLAOutput
from openvla_lightning.processor import Processor
from openvla_lightning.types import Batch, Step

PATCHES = 5


def batch_of(head: TokenHead, chunks: np.ndarray) -> Batch:
    processor = Processor(head, image_size=8, means=[[0.5] * 3], stds=[[0.5] * 3])
    texts = ["lift the red cube", "push the yellow can to the left, gently", "stop"]
    steps = [
        Step({"primary": np.zeros((8, 8, 3), np.uint8)}, texts[i % 3], chunk, "toy") for i, chunk in enumerate(chunks)
    ]
    return processor.collate(steps)


def perfect_output(batch: Batch, vocab: int) -> VLAOutput:
    """Logits that predict every next token, whatever stands where the image is."""
    ids = torch.cat([batch.input_ids[:, 1:], batch.input_ids[:, :1]], dim=1)
    logits = torch.nn.functional.one_hot(ids, vocab).float() * 50
    return VLAOutput(logits=torch.cat([torch.randn(len(ids), PATCHES, vocab), logits], dim=1), num_patches=PATCHES)


CHUNKS = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 7)), elements=st.floats(-1, 1, width=32)
)


@given(CHUNKS)
def test_a_perfect_prediction_scores_perfectly(chunks: np.ndarray) -> None:
    head = TokenHead(vocab_size=768)
    batch = batch_of(head, chunks)
    output = perfect_output(batch, 768)
    correct, error = head.score(output, batch)
    assert correct.shape == error.shape == (len(chunks), chunks[0].size)
    assert correct.all()
    assert not error.any()
    assert head.loss(output, batch) < 1e-6


@given(CHUNKS, st.integers(1, 60))
def test_error_is_the_distance_of_bin_centres(chunks: np.ndarray, bins_off: int) -> None:
    head = TokenHead(vocab_size=768)
    batch = batch_of(head, np.clip(chunks, -0.5, 0.5))
    output = perfect_output(batch, 768)
    shifted = VLAOutput(logits=output.logits.roll(bins_off, dims=-1), num_patches=PATCHES)
    correct, error = head.score(shifted, batch)
    assert not correct.any()
    torch.testing.assert_close(error, torch.full_like(error, bins_off * 2 / 255), atol=1e-5, rtol=0)


@given(CHUNKS)
def test_decode_inverts_encode_up_to_a_bin(chunks: np.ndarray) -> None:
    head = TokenHead(vocab_size=768)
    actions = torch.from_numpy(chunks)
    decoded = head.decode(head.encode(actions))
    assert decoded.dtype == torch.float64
    assert (decoded - actions.flatten(1)).abs().max() <= 1 / 255 + 1e-6


def test_end_tokens_above_the_action_ids_are_not_scored() -> None:
    """Some vocabularies put their end token above the ids set aside for actions."""
    head = TokenHead(num_bins=256, vocab_size=768)
    batch = batch_of(head, np.zeros((1, 1, 7), np.float32))
    high_end = batch.labels.clone()
    high_end[high_end == 2] = 900
    moved = Batch(batch.pixel_values, batch.input_ids, batch.attention_mask, high_end, batch.actions)
    correct, _ = head.score(perfect_output(batch, 1000), moved)
    assert correct.shape == (1, 7)
    assert correct.all()


def test_the_loss_covers_actions_and_end_token_only() -> None:
    head = TokenHead(vocab_size=768)
    batch = batch_of(head, np.zeros((2, 1, 7), np.float32))
    assert (batch.labels != -100).sum(1).tolist() == [8, 8]
    output = perfect_output(batch, 768)
    prompt_scrambled = output.logits.clone()
    for row, length in enumerate(batch.attention_mask.sum(1)):
        prompt_scrambled[row, : PATCHES + int(length) - 9] = torch.randn(768)
    scrambled = VLAOutput(logits=prompt_scrambled, num_patches=PATCHES)
    torch.testing.assert_close(head.loss(scrambled, batch), head.loss(output, batch))


def test_config_round_trip() -> None:
    head = TokenHead(num_bins=128, vocab_size=1000)
    assert TokenHead.from_config(head.config).config == head.config == {"num_bins": 128, "vocab_size": 1000}
