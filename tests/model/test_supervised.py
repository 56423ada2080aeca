"""The training step computes what is learnt and nothing else, and never waits for the device."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openvla_lightning.action_head import TextHead, TokenHead
from openvla_lightning.model import VLA
from openvla_lightning.processor import ChatProcessor, Processor
from openvla_lightning.types import IGNORE_INDEX, Batch, Conversation, Observation, Prediction, Step

MEANS = STDS = [[0.5] * 3] * 2
WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero"}
WORDS = ["stop", "lift the red cube", "push the yellow can to the left, gently"]


@pytest.fixture(scope="module")
def model(vla: VLA) -> VLA:
    """This file's own: it gets gradients and hooks."""
    return copy.deepcopy(vla)


def robot(rows: int, chunk: int, dim: int) -> tuple[TokenHead, Batch]:
    head = TokenHead(vocab_size=768)
    actions = np.random.default_rng(rows).uniform(-1, 1, (rows, chunk, dim)).astype(np.float32)
    steps = [
        Step(Observation({"primary": np.full((56, 56, 3), 40 * row, np.uint8)}, WORDS[row % 3]), actions[row], "toy")
        for row in range(rows)
    ]
    return head, Processor(head, image_size=56, means=MEANS, stds=STDS).collate(steps)


def chat(turns: list[list[tuple[str, str]]]) -> tuple[TokenHead, Batch]:
    head = TextHead(vocab_size=768)
    talks = [Conversation(np.zeros((56, 56, 3), np.uint8), tuple(row), "chat") for row in turns]
    return head, ChatProcessor(head, image_size=56, means=MEANS, stds=STDS).collate(talks)


def run(vla: VLA, head: TokenHead, batch: Batch) -> tuple[Tensor, Prediction]:
    pixels = batch.pixel_values.float().div(255).repeat(1, 2, 1, 1)
    return head.loss(vla, replace(batch, pixel_values=pixels))


def run_whole(vla: VLA, head: TokenHead, batch: Batch) -> tuple[Tensor, Prediction]:
    """The same from the logits of all positions, under a mask."""
    pixels = batch.pixel_values.float().div(255).repeat(1, 2, 1, 1)
    output = vla(pixel_values=pixels, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    every = torch.arange(batch.input_ids.shape[1] - 1).expand(len(batch), -1)
    logits = output.next_token_logits
    return head.criterion(logits, batch.labels[:, 1:]), head.prediction(logits, replace(batch, places=every))


def learnt_is_all_that_counts(vla: VLA, head: TokenHead, batch: Batch) -> None:
    """Loss, gradients and metrics of supervised positions are those of all logits under a mask."""
    found = []
    for way in (run, run_whole):
        vla.zero_grad()
        loss, prediction = way(vla, head, batch)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in vla.parameters() if p.grad is not None])
        metrics = head.metrics(["toy", "chat"])
        metrics.update(prediction, batch)
        found.append((loss.detach(), gradients, metrics.compute()))
    (loss, gradients, values), (whole_loss, whole_gradients, whole_values) = found
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-6)
    assert (gradients - whole_gradients).norm() < 1e-5 * whole_gradients.norm()
    torch.testing.assert_close(values, whole_values)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 4), chunk=st.integers(1, 2), dim=st.integers(1, 7))
def test_supervised_positions_learn_as_all_positions_do(model: VLA, rows: int, chunk: int, dim: int) -> None:
    head, batch = robot(rows, chunk, dim)
    assert batch.places.shape == (rows, chunk * dim + 1), "one number for all rows, whatever is said"
    learnt_is_all_that_counts(model, head, batch)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.tuples(*[st.sampled_from(WORDS)] * 2), min_size=1, max_size=2), min_size=1, max_size=3))
def test_answers_of_any_length_learn_as_all_positions_do(model: VLA, turns: list[list[tuple[str, str]]]) -> None:
    head, batch = chat(turns)
    assert batch.places.shape[1] == (batch.labels != IGNORE_INDEX).sum(1).max()
    learnt_is_all_that_counts(model, head, batch)


def test_no_logits_of_anything_else_are_made(model: VLA) -> None:
    head, batch = robot(3, 1, 7)
    shapes = []
    hook = model.llm.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    run(model, head, batch)
    hook.remove()
    assert shapes == [(3, 8, 832)]


def test_no_block_behind_the_one_that_is_read_runs(build: Callable[..., VLA], config: dict[str, Any]) -> None:
    vla, (_, batch) = build(config), robot(1, 1, 7)
    ran = []
    for tower in vla.vision_backbone.featurizers:
        for block in tower.blocks:
            block.register_forward_hook(lambda module, args, output: ran.append(module))
        for unused in (tower.norm, *([tower.attn_pool] if getattr(tower, "attn_pool", None) else [])):
            unused.register_forward_hook(lambda module, args, output: pytest.fail("a dead layer ran"))
    vla(pixel_values=torch.zeros(1, 6, 56, 56), input_ids=batch.input_ids)
    assert ran == [block for tower in vla.vision_backbone.featurizers for block in tower.blocks[:-1]]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi"])
def test_attention_is_causal_without_a_mask(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    config["llm"]["architecture"]["model_type"] = model_type
    vla = VLA.from_config(config)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return attend(*args, **kwargs)

    _, batch = robot(2, 1, 7)
    hidden = vla.llm.embed(batch.input_ids)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    vla.llm.decode(hidden)
    assert seen == [(None, True)] * 2


class Waiting(TorchDispatchMode):
    """Notes operations whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).rpartition(".")[0] in WAITS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_with_its_metrics_never_waits_for_the_device(model: VLA) -> None:
    for head, batch in (robot(3, 1, 7), chat([[("what?", "this")], [("and?", "that and that")]])):
        metrics = head.metrics(["chat", "toy"])
        with Waiting() as waiting:
            loss, prediction = run(model, head, batch)
            loss.backward()
            metrics.update(prediction, batch)
        assert not waiting.found
        with Waiting() as waiting:
            bool(loss > 0)
        assert waiting.found, "or this test sees nothing"


def test_batches_keep_their_supervised_positions_when_cut_and_moved() -> None:
    _, batch = chat([[("what?", "this")], [("and?", "that and that")]])
    assert torch.equal(batch.rows(0, 1).places, batch.places[:1])
    assert torch.equal(batch.to("cpu").places, batch.places)
    learnt = batch.labels[:, 1:].gather(1, batch.places) != IGNORE_INDEX
    assert torch.equal(learnt.sum(1), (batch.labels[:, 1:] != IGNORE_INDEX).sum(1))
