"""Means over tokens, not over batches, and per dataset."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.action_head.metrics import ActionMetrics


@given(
    names=st.lists(st.sampled_from("abc"), min_size=1, max_size=20),
    cut=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_any_split_into_batches_gives_the_same_means(names: list[str], cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(len(names), 7, generator=generator) > 0.5
    error = torch.rand(len(names), 7, generator=generator)
    metrics = ActionMetrics(["a", "b", "c", "never"])
    for part in (slice(0, cut), slice(cut, None)):
        if names[part]:
            metrics.update(correct[part], error[part], names[part])
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
    metrics.update(torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, 7), ["a"])
    metrics.reset()
    assert metrics.compute() == {}
