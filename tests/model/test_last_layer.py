"""The last layer at the places that are read: the same states and gradients as of the whole layer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from openvla_lightning.model.llm import CausalLM
from openvla_lightning.model.positions import at

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},  # reads nothing alone where the window is shorter
    "phi": {},  # its MLP runs beside attention
}


def language_model(family: str) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return CausalLM("none", {"model_type": family, "num_attention_heads": 4, **sizes, **FAMILIES[family]}, 64)


def states_and_gradients(model: CausalLM, result: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    named = {
        "embeddings": embeddings,
        **{n: p for n, p in model.named_parameters() if "lm_head" not in n and "embed" not in n},
    }
    gradients = torch.autograd.grad((result * weights).sum(), list(named.values()))
    return {"states": result.detach(), **dict(zip(named, gradients, strict=True))}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_whole_layer(family: str, causal: bool, padded: bool) -> None:
    model, draw = language_model(family), torch.Generator().manual_seed(2)
    embeddings = torch.randn(3, 24, 32, generator=draw, requires_grad=True)
    places = torch.randint(4, 15, (3, 5), generator=draw)
    mask = torch.arange(24) < torch.tensor([24, 15, 19])[:, None] if padded and not causal else None
    whole = at(model.decode(embeddings, mask, causal=causal), places)
    expected = states_and_gradients(model, whole, embeddings)
    found = states_and_gradients(model, model.decode_at(embeddings, places, mask, causal), embeddings)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_it_computes_the_mlp_for_what_is_read_alone() -> None:
    model = language_model("llama")
    rows: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, result: rows.append(result.shape[1]))
    model.decode_at(torch.randn(2, 24, 32), torch.tensor([[3, 4], [7, 8]]))
    assert rows == [24, 24, 2]


def test_a_copy_reads_with_its_own_weights() -> None:
    model = language_model("llama")
    other = copy.deepcopy(model)
    embeddings, places = torch.randn(1, 6, 32), torch.tensor([[5]])
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            parameter.zero_()
    expected = at(other.decode(embeddings), places)
    torch.testing.assert_close(other.decode_at(embeddings, places), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model.decode_at(embeddings, places), expected)
