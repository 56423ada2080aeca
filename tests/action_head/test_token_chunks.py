"""Heads that give a chunk in one pass: the fast way is the plain way, alone as in a batch; what they refuse."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_vla import CONFIG, build_small

from openvla_lightning.action_head import Acting, ActionHead, DiffusionHead, L1Head, TokenHead
from openvla_lightning.model import VLA
from openvla_lightning.model.parallel_decoding import bucketed
from openvla_lightning.plugins import describe, rebuild
from openvla_lightning.processor.image_transform import ImageTransform
from openvla_lightning.quantisation import KEEP, quantised_names
from openvla_lightning.strategy import LoRA, TrainOnly
from openvla_lightning.types import Batch, Inputs

HEAD = "openvla_lightning.action_head.TokenHead"
HEADS: dict[str, ActionHead] = {
    "l1": L1Head(4, 3),
    "squared": L1Head(4, 3, error="squared"),
    "diffusion": DiffusionHead(4, 3, steps=5),
    "tokens": TokenHead(256, 768, 4, parallel=True),
}
TEXTS = ([1, 5, 6, 7, 8, 9, 10], [1, 5, 300], [1, 7, 6, 5, 400])


@pytest.fixture(scope="module", params=HEADS)
def head(request: pytest.FixtureRequest) -> ActionHead:
    return HEADS[request.param]


@pytest.fixture(scope="module")
def vla(head: ActionHead) -> VLA:
    config = {**copy.deepcopy(CONFIG), "action_head": describe(head, HEAD), "proprio_dim": 5, "film": "masked"}
    return build_small(config)


def acting(**options: Any) -> Acting:
    normalise = ImageTransform(56, [[0.5] * 3] * 2, [[0.5] * 3] * 2).normalise
    return Acting(normalise=two_views(normalise), **options)


def two_views(normalise: Any) -> Any:
    """Normalises one view after the other, whatever the transform makes of several."""
    return lambda pixels: torch.cat([normalise(view) for view in pixels.split(3, dim=1)], dim=1)


def inputs(head: ActionHead, actions: torch.Tensor | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    written = head.write(actions, len(TEXTS), 3, 2)
    rows = [text + ids for text, ids in zip(TEXTS, written, strict=True)]
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.tensor([len(text) for text in TEXTS])
    return Inputs(
        pixel_values=torch.randint(0, 256, (len(TEXTS), 6, 56, 56), generator=generator, dtype=torch.uint8),
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=torch.arange(width) < lengths[:, None],
        places=starts[:, None] - 1 + torch.arange(len(written[0])),
        proprio=torch.rand(len(TEXTS), 5, generator=generator) * 2 - 1,
    )


def same(ours: torch.Tensor, expected: torch.Tensor, head: ActionHead) -> None:
    """Equal but for rounding, which grows from one denoising step to the next."""
    torch.testing.assert_close(ours, expected, atol=1e-3 if isinstance(head, DiffusionHead) else 1e-5, rtol=0)


def test_fast_is_plain(vla: VLA, head: ActionHead) -> None:
    given = inputs(head)
    plain = head.decoder(vla, acting(static=False))(given, 3, torch.Generator().manual_seed(1))
    fast = head.decoder(vla, acting())(given, 3, torch.Generator().manual_seed(1))
    assert plain.shape == (len(TEXTS), head.action_chunk, 3)
    same(fast, plain, head)


def test_padding_to_a_shared_shape_changes_nothing(vla: VLA, head: ActionHead) -> None:
    given = inputs(head)
    wide = bucketed(given)
    assert len(wide) == 4
    assert wide.input_ids.shape[1] % 16 == 0
    decode = head.decoder(vla, acting(options={"temperature": 0.0}) if isinstance(head, TokenHead) else acting())
    narrow = decode(given, 3, torch.Generator().manual_seed(1))
    wider = decode(wide, 3, torch.Generator().manual_seed(1))[: len(given)]
    same(wider, narrow, head)


def test_a_row_is_what_it_is_alone(vla: VLA, head: ActionHead) -> None:
    given = inputs(head)
    decode = head.decoder(vla, acting())
    together = decode(given, 3, torch.Generator().manual_seed(1))
    for row in range(len(together)):
        width = int(given.attention_mask[row].sum())
        own = given.rows(row, row + 1)
        own = replace(own, input_ids=own.input_ids[:, :width], attention_mask=own.attention_mask[:, :width])
        alone = decode(own, 3, torch.Generator().manual_seed(1))
        same(alone[0], together[row], head)


def test_a_step_of_learning(head: ActionHead) -> None:
    """Everything that a released VLA lacks gets a gradient, and padded actions say nothing."""
    config = {**copy.deepcopy(CONFIG), "action_head": describe(head, HEAD), "proprio_dim": 5, "film": "released"}
    vla = build_small(config)
    actions = torch.rand(len(TEXTS), 4, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1
    given = inputs(head, actions)
    written = head.write(actions, len(TEXTS), 3, 2)
    labels = torch.full_like(given.input_ids, -100)
    for row, (text, ids) in enumerate(zip(TEXTS, written, strict=True)):
        labels[row, len(text) : len(text) + len(ids)] = torch.tensor(ids)
    values = {name: getattr(given, name) for name in ("input_ids", "attention_mask", "places", "proprio")}
    padded = torch.zeros(len(TEXTS), 4, dtype=torch.bool)
    padded[1, 2:] = True
    pixels = acting().normalise(given.pixel_values)
    batch = Batch(
        **values, pixel_values=pixels, labels=labels, actions=actions, padded=padded, numbers=list(range(len(TEXTS)))
    )
    loss, prediction = head.loss(vla, batch)
    loss.backward()
    assert prediction.actions.shape == actions.shape
    last = [vla.vision_backbone.featurizers[0].blocks[-1], vla.vision_backbone.featurizers[1].blocks[-1]]
    unread = {parameter for block in last for parameter in block.parameters()}
    for part in vla.added():
        for parameter in part.parameters():
            assert parameter in unread or (parameter.grad is not None and parameter.grad.any())
    if isinstance(head, L1Head):
        changed = actions.clone()
        changed[1, 2:] = 0.77
        again, _ = head.loss(vla, replace(batch, actions=changed))
        if not isinstance(head, DiffusionHead):  # there they are part of what is seen
            assert torch.equal(loss, again)


def test_the_error_of_a_regression_is_the_absolute_one_or_its_square() -> None:
    class Answers(L1Head):
        def predict(self, *_: Any) -> torch.Tensor:
            return torch.tensor([[[0.5, 0.0]], [[0.0, 0.0]]])

    batch: Any = type("Given", (), {"actions": torch.zeros(2, 1, 2), "padded": None})()
    assert Answers(1, 2).loss(None, batch)[0] == 0.5 / 4  # type: ignore[arg-type]
    assert Answers(1, 2, "squared").loss(None, batch)[0] == 0.25 / 4  # type: ignore[arg-type]
    batch.padded = torch.tensor([[False], [True]])
    assert Answers(1, 2, "squared").loss(None, batch)[0] == 0.25 / 2  # type: ignore[arg-type]
    assert "error" not in L1Head(1, 2).config, "as in checkpoints from before there was a choice"
    with pytest.raises(ValueError, match="error=huber is not known; choose absolute or squared"):
        L1Head(1, 2, error="huber")  # type: ignore[arg-type]


def test_config_round_trip(head: ActionHead) -> None:
    again = rebuild(describe(head, HEAD), HEAD)
    assert type(again) is type(head)
    assert again.config == head.config


@pytest.mark.parametrize("kind", ["l1", "diffusion"])
def test_chunks_of_another_shape_are_refused(kind: str) -> None:
    head = HEADS[kind]
    with pytest.raises(ValueError, match="predicts 4 actions of 3 numbers, the data have chunks of \\[2, 3\\]"):
        head.write(torch.zeros(1, 2, 3), 1, 3, 2)
    with pytest.raises(ValueError, match="the data have 7 numbers"):
        head.write(None, 1, 7, 2)
    with pytest.raises(ValueError, match="does not act with temperature"):
        head.decoder(
            build_small({**copy.deepcopy(CONFIG), "action_head": describe(head, HEAD)}),
            acting(options={"temperature": 1.0}),
        )


def test_denoising_steps_are_an_option() -> None:
    head = HEADS["diffusion"]
    vla = build_small({**copy.deepcopy(CONFIG), "action_head": describe(head, HEAD), "proprio_dim": 5})
    given = inputs(head)
    actions = [
        head.decoder(vla, acting(options={"steps": steps}))(given, 3, torch.Generator().manual_seed(1)).numpy()
        for steps in (2, 10)
    ]
    assert not np.allclose(*actions)
    with pytest.raises(ValueError, match="60 steps do not divide"):
        head.decoder(vla, acting(options={"steps": 60}))


def test_tokens_may_be_drawn_all_at_once() -> None:
    head = HEADS["tokens"]
    vla = build_small({**copy.deepcopy(CONFIG), "proprio_dim": 5})
    given = inputs(head)
    drawn = [
        head.decoder(vla, acting(options={"temperature": 1.0, "action_ids_only": True}))(
            given, 3, torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_new_parts_learn_in_full_whatever_the_strategy_and_are_not_quantised(vla: VLA, head: ActionHead) -> None:
    config = {**copy.deepcopy(CONFIG), "action_head": describe(head, HEAD), "proprio_dim": 5, "film": "masked"}
    new = {name for name, _ in vla.named_parameters() if name.startswith(("action_head.", "proprio_projector."))}
    new |= {name for name, _ in vla.named_parameters() if ".scale." in name or ".shift." in name}
    assert len(new) == sum(1 for part in vla.added() for _ in part.parameters())
    quantised = {f"{name}.weight" for name in quantised_names(vla, KEEP)}
    assert quantised
    assert not quantised & new
    for strategy in (LoRA(rank=2), LoRA(rank=2, targets="linear", within=["llm"]), TrainOnly(["llm.last_layer"])):
        learner = build_small(config)
        strategy.apply(learner)
        learning = {name for name, parameter in learner.named_parameters() if parameter.requires_grad}
        assert new <= learning, "under its own name: no adapter stands between"
        assert not [name for name in learning if ".lora_" in name and name.startswith(("action_head.", "proprio_"))]
