"""The learning rate over a run, and which parameters decay."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.optim import SCHEDULES, STATE_BYTES, AdamW, _rounded


@given(schedule=st.sampled_from(SCHEDULES), warmup=st.floats(0, 0.5), total=st.integers(1, 500), final=st.floats(0, 1))
def test_factor_stays_in_range_and_falls_after_the_warmup(
    schedule: str, warmup: float, total: int, final: float
) -> None:
    drop_at = {"drop_at": 1} if schedule == "step" else {}
    optim = AdamW(lr=1.0, schedule=schedule, warmup_ratio=warmup, final_ratio=final, **drop_at)
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


@pytest.mark.parametrize("options", [{}, {"schedule": "step", "drop_at": 3, "final_ratio": 0.1}])
def test_a_run_without_an_end_keeps_its_rate(options: dict[str, Any]) -> None:
    (optimizer,), _ = AdamW(lr=0.5, **options).build([torch.nn.Parameter(torch.zeros(2, 2))], math.inf)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        AdamW(lr=0.1, schedule="cosin")


def trained(kind: str, steps: int = 200) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A small regression, from the same start on the same data."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = AdamW(lr=1e-2, kind=kind).build(model.parameters(), steps)[0][0]
    target = torch.randn(64, 64, generator=generator) / 8
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        loss = (model(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", ["adamw_bf16", "adamw_8bit"])
def test_small_states_learn_what_whole_ones_learn(kind: str) -> None:
    (whole, _), (small, optimizer) = trained("adamw"), trained(kind)
    assert (small.weight - whole.weight).norm() < 0.05 * whole.weight.norm()
    states = optimizer.state[small.weight]
    remembered = [v for v in states.values() if torch.is_tensor(v) and v.shape == small.weight.shape]
    assert sum(v.numel() * v.element_size() for v in remembered) == int(STATE_BYTES[kind]) * small.weight.numel()


def test_small_states_resume_exactly() -> None:
    model, optimizer = trained("adamw_bf16", 5)
    again = AdamW(lr=1e-2, kind="adamw_bf16").build(model.parameters(), 5)[0][0]
    again.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[model.weight].items():
        found = again.state[model.weight][name]
        assert torch.equal(found, value) if torch.is_tensor(value) else found == value
        assert not torch.is_tensor(value) or found.dtype == torch.bfloat16, "loading must not widen them"


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_rounding_takes_a_neighbour(values: list[float]) -> None:
    exact = torch.tensor(values)
    rounded = _rounded(exact)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert ((rounded - exact).abs() <= exact.abs() / 128 + 1e-38).all()


def test_rounding_is_right_on_average() -> None:
    torch.manual_seed(0)
    assert _rounded(torch.full((200_000,), 1.003)).mean() == pytest.approx(1.003, abs=1e-4)


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="adamw, adamw_bf16, adamw_8bit"):
        AdamW(lr=0.1, kind="adam8")


@pytest.mark.parametrize(
    "wrong",
    [{"lr": math.inf}, {"weight_decay": -0.1}, {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"warmup_ratio": 1.5}],
)
def test_a_number_that_nothing_can_learn_with_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdamW(**{"lr": 0.1, **wrong})
