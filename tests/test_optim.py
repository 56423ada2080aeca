"""The learning rate over a run, and which parameters decay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.optim import SCHEDULES, AdamW


@given(schedule=st.sampled_from(SCHEDULES), warmup=st.floats(0, 0.5), total=st.integers(1, 500), final=st.floats(0, 1))
def test_factor_stays_in_range_and_falls_after_the_warmup(
    schedule: str, warmup: float, total: int, final: float
) -> None:
    optim = AdamW(lr=1.0, schedule=schedule, warmup_ratio=warmup, final_ratio=final)
    factors = [optim.factor(step, total) for step in range(total + 1)]
    assert all(0 <= f <= 1 for f in factors)
    peak = round(warmup * total)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if schedule == "constant":
        assert factors[-1] == 1
    elif peak < total:
        assert factors[-1] == pytest.approx(final)


def test_vectors_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].requires_grad_(False)
    groups = AdamW(lr=0.1, weight_decay=0.5).build(model.parameters(), 10)[0][0].param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert [len(g["params"]) for g in groups] == [1, 3]


def test_a_wholly_frozen_model_is_an_error() -> None:
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="froze the whole model"):
        AdamW(lr=0.1).build(model.parameters(), 10)


def test_a_decaying_schedule_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        AdamW(lr=0.1, schedule="cosine").build(torch.nn.Linear(2, 2).parameters(), -1)


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        AdamW(lr=0.1, schedule="cosin")
