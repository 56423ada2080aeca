"""Attention under autocast on a CPU is worked out in float32, and is as it was everywhere else."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from openvla_lightning.model.attention import sdpa_without_mask


@pytest.fixture
def module() -> nn.Module:
    made = nn.Module()
    made.is_causal, made.training = True, False  # type: ignore[assignment]
    return made


def states(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def test_in_float32_under_autocast(module: nn.Module) -> None:
    given = states(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = sdpa_without_mask(module, *given, None)
    wide = [state.detach().float() for state in given]
    expected, _ = sdpa_attention_forward(module, *wide, None)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    out.float().square().sum().backward()
    assert all(state.grad is not None and state.grad.dtype == torch.bfloat16 for state in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_it_was_without(module: nn.Module, dtype: torch.dtype) -> None:
    given = states(dtype)
    assert torch.equal(sdpa_without_mask(module, *given, None)[0], sdpa_attention_forward(module, *given, None)[0])
