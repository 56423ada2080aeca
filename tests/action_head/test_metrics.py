"""Means over tokens, not over batches, and per dataset."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.action_head.metrics import ActionMetrics
from openvla_lightning.types import Batch, Prediction


def of(names: list[str], padded: torch.Tensor | None = None) -> Batch:
    """A batch of which names and padding count."""
    ids = torch.zeros(len(names), 1, dtype=torch.long)
    return Batch(
        pixel_values=torch.zeros(len(names), 3, 1, 1),
        input_ids=ids,
        attention_mask=ids > 0,
        places=ids,
        labels=ids,
        actions=torch.zeros(len(names), 1 if padded is None else padded.shape[1], 7),
        padded=padded,
        dataset_names=names,
    )


def prediction(actions: torch.Tensor, correct: torch.Tensor | None) -> Prediction:
    """Zeros were right."""
    return Prediction(actions=actions, targets=torch.zeros_like(actions), correct=correct)


@given(
    names=st.lists(st.sampled_from("abc"), min_size=1, max_size=20),
    cut=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_any_split_into_batches_gives_the_same_means(names: list[str], cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(len(names), 7, generator=generator) > 0.5
    actions = torch.rand(len(names), 1, 7, generator=generator)
    error = actions.flatten(1)
    metrics = ActionMetrics(["a", "b", "c", "never"])
    for part in (slice(0, cut), slice(cut, None)):
        if names[part]:
            metrics.update(prediction(actions[part], correct[part]), of(names[part]))
    values = metrics.compute()
    assert set(values) == {f"{m}{s}" for m in ("action_accuracy", "l1") for s in ("", *(f"/{n}" for n in set(names)))}
    torch.testing.assert_close(values["l1"], error.mean())
    for name in set(names):
        rows = [i for i, n in enumerate(names) if n == name]
        torch.testing.assert_close(values[f"action_accuracy/{name}"], correct[rows].float().mean())
        torch.testing.assert_close(values[f"l1/{name}"], error[rows].mean())


def test_nothing_seen_gives_nothing_to_log() -> None:
    metrics = ActionMetrics(["a"])
    assert metrics.compute() == {}
    metrics.update(prediction(torch.zeros(1, 1, 7), torch.ones(1, 7, dtype=torch.bool)), of(["a"]))
    metrics.reset()
    assert metrics.compute() == {}


def test_a_head_that_chooses_nothing_has_no_accuracy_and_padding_does_not_count() -> None:
    metrics = ActionMetrics(["a"])
    actions = torch.ones(1, 3, 7)
    actions[:, 2] = 5.0
    metrics.update(prediction(actions, None), of(["a"], torch.tensor([[False, False, True]])))
    assert metrics.compute() == {"l1": 1.0, "l1/a": 1.0}
