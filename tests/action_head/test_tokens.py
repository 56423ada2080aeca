"""What a head writes, learns, predicts and decodes agrees with itself and with plain definitions."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from openvla_lightning.action_head import Acting, TokenHead
from openvla_lightning.plugins import describe, rebuild
from openvla_lightning.processor import Processor
from openvla_lightning.types import IGNORE_INDEX, Batch, Observation, Prediction, Step, learnt_places

HEAD = "openvla_lightning.action_head.TokenHead"


def batch_of(head: TokenHead, chunks: np.ndarray) -> Batch:
    processor = Processor(head, image_size=8, means=[[0.5] * 3], stds=[[0.5] * 3])
    texts = ["lift the red cube", "push the yellow can to the left, gently", "stop"]
    steps = [
        Step(Observation({"primary": np.zeros((8, 8, 3), np.uint8)}, texts[i % 3]), chunk, "toy")
        for i, chunk in enumerate(chunks)
    ]
    return processor.collate(steps)


def targets(batch: Batch) -> Tensor:
    return batch.labels[:, 1:].gather(1, batch.places)


def says(logits: Tensor) -> Any:
    """A model that gives these logits [B, K, vocab] at the places it is asked for."""
    return lambda **given: SimpleNamespace(logits=logits)


def perfect(batch: Batch, vocab: int) -> Tensor:
    """Logits that predict what is asked for."""
    return torch.nn.functional.one_hot(targets(batch), vocab).float() * 50


def predicted(head: TokenHead, logits: Tensor, batch: Batch) -> tuple[Tensor, Prediction]:
    return head.loss(says(logits), batch)


CHUNKS = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 7)), elements=st.floats(-1, 1, width=32)
)


@given(CHUNKS)
def test_a_perfect_prediction_scores_perfectly(chunks: np.ndarray) -> None:
    head = TokenHead(vocab_size=768)
    batch = batch_of(head, chunks)
    loss, prediction = predicted(head, perfect(batch, 768), batch)
    assert prediction.correct is not None
    assert prediction.correct.shape == prediction.error.shape == (len(chunks), chunks[0].size)
    assert prediction.correct.all()
    assert not prediction.error.any()
    assert (prediction.actions - batch.actions).abs().max() <= 1 / 255 + 1e-6
    assert loss < 1e-6


@given(CHUNKS, st.integers(1, 60))
def test_error_is_the_distance_of_bin_centres(chunks: np.ndarray, bins_off: int) -> None:
    head = TokenHead(vocab_size=768)
    batch = batch_of(head, np.clip(chunks, -0.5, 0.5))
    _, prediction = predicted(head, perfect(batch, 768).roll(bins_off, dims=-1), batch)
    assert prediction.correct is not None
    assert not prediction.correct.any()
    error = prediction.error
    torch.testing.assert_close(error, torch.full_like(error, bins_off * 2 / 255), atol=1e-5, rtol=0)


@given(CHUNKS)
def test_decode_inverts_encode_up_to_a_bin(chunks: np.ndarray) -> None:
    head = TokenHead(vocab_size=768)
    actions = torch.from_numpy(chunks)
    decoded = head.decode(head.encode(actions))
    assert decoded.dtype == torch.float64
    assert (decoded - actions.flatten(1)).abs().max() <= 1 / 255 + 1e-6


def test_what_is_written_is_the_chunk_and_the_end() -> None:
    head = TokenHead(vocab_size=768, action_chunk=2)
    actions = torch.rand(3, 2, 4) * 2 - 1
    assert head.write(actions, 3, 4, end=2) == [[*ids, 2] for ids in head.encode(actions).tolist()]
    assert head.write(None, 3, 4, end=2) == [[], [], []], "when acting it writes them itself"


def test_end_tokens_above_the_action_ids_are_not_scored() -> None:
    """Some vocabularies put their end token above the ids set aside for actions."""
    head = TokenHead(num_bins=256, vocab_size=768)
    batch = batch_of(head, np.zeros((1, 1, 7), np.float32))
    high_end = batch.labels.clone()
    high_end[high_end == 2] = 900
    moved = replace(batch, labels=high_end)
    _, prediction = predicted(head, perfect(moved, 1000), moved)
    assert prediction.correct is not None
    assert prediction.correct.shape == (1, 7)
    assert prediction.correct.all()


def test_the_loss_covers_actions_and_end_token_only() -> None:
    head = TokenHead(vocab_size=768)
    batch = batch_of(head, np.zeros((2, 1, 7), np.float32))
    assert (batch.labels != IGNORE_INDEX).sum(1).tolist() == [8, 8]
    assert torch.equal(batch.places, learnt_places(batch.labels))
    lengths = batch.attention_mask.sum(1)
    assert batch.places.tolist() == [list(range(n - 9, n - 1)) for n in lengths.tolist()], "one before each learnt id"


def test_actions_past_the_end_of_a_trajectory_are_not_learnt() -> None:
    head = TokenHead(vocab_size=768, action_chunk=3)
    batch = batch_of(head, np.linspace(-1, 1, 2 * 3 * 7, dtype=np.float32).reshape(2, 3, 7))
    batch = replace(batch, padded=torch.tensor([[False, False, True], [False, False, False]]))
    logits = perfect(batch, 768)
    wrong = logits.clone()
    wrong[0, 14:21] = 0.0  # the third action of the first row: neither learnt nor scored
    loss, prediction = predicted(head, wrong, batch)
    assert loss < 1e-6
    metrics = head.metrics(["toy"])
    metrics.update(prediction, batch)
    values = metrics.compute()
    assert values["action_accuracy"] == 1
    assert values["l1"] == 0
    wrong[1, 20] = 0.0
    assert predicted(head, wrong, batch)[0] > 0.1, "others are"


def test_entropy_is_that_of_the_prediction() -> None:
    head = TokenHead(vocab_size=768)
    batch = batch_of(head, np.zeros((2, 1, 7), np.float32))
    logits = torch.zeros(2, 8, 768)
    logits[1, :, 600] = 1e4
    entropy = predicted(head, logits, batch)[1].entropy
    assert entropy is not None
    assert entropy.shape == (2, 7)
    assert entropy[0].tolist() == pytest.approx([np.log(768)] * 7)
    assert entropy[1].tolist() == pytest.approx([0.0] * 7)


def test_plain_data_and_back() -> None:
    head = TokenHead(num_bins=128, vocab_size=1000, action_chunk=4)
    assert head.config == {"num_bins": 128, "vocab_size": 1000, "action_chunk": 4}
    assert describe(head, HEAD) == {"class": "TokenHead", **head.config}
    for config in (head.config, describe(head, HEAD), {"class": HEAD, **head.config}):
        again = rebuild(config, HEAD)
        assert type(again) is TokenHead
        assert again.config == head.config
    assert rebuild({"num_bins": 128, "vocab_size": 1000}, HEAD).action_chunk == 1, "as in checkpoints before chunks"
    assert type(rebuild({"class": "TextHead"}, HEAD)).__name__ == "TextHead"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"class": "os.path.join"}, r"package os is not known here.*entry-points"),
        ({"class": "Regression"}, r"action_head.Regression cannot be imported"),
        ({"class": "openvla_lightning.nowhere.Head"}, "cannot be imported"),
        ({"class": "openvla_lightning.action_head.base.on_device"}, "is no class"),
        ({"steps": 3}, "does not take these arguments"),
    ],
)
def test_a_class_that_is_not_to_be_had_is_named(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        rebuild(config, HEAD)


def test_an_option_of_another_head_is_refused() -> None:
    acting = Acting(normalise=lambda pixels: pixels, options={"steps": 3})
    with pytest.raises(ValueError, match="TokenHead does not act with steps: it takes action_ids_only, temperature"):
        TokenHead().decoder(None, acting)  # type: ignore[arg-type]
