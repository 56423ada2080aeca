"""The flow head in training and in acting, beside a small model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from openvla_lightning.action_head import Acting, ActionHead
from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.flow import FlowHead
from openvla_lightning.model import VLA
from openvla_lightning.plugins import USUAL_HEAD, describe
from openvla_lightning.processor import Processor
from openvla_lightning.types import Observation, Step

STATISTICS = [[0.5, 0.5, 0.5]] * 2


@pytest.mark.parametrize("insulate", [False, True])
@pytest.mark.parametrize("layer", [1, 2, None])
def test_training_and_acting_read_the_same_states(
    config: dict[str, Any], build: Callable[..., VLA], layer: int | None, insulate: bool
) -> None:
    head = FlowHead(2, 7, width=16, depth=1, heads=2, read_layer=layer, insulate=insulate, vocab_size=768)
    vla = build({**config, "action_head": describe(head, USUAL_HEAD)})
    processor = Processor(head, image_size=56, means=STATISTICS, stds=STATISTICS)
    seen = Observation({"primary": np.full((56, 56, 3), 90, np.uint8)}, "lift the red cube")
    batch = processor.normalise(processor.collate([Step(seen, np.full((2, 7), 0.5, np.float32), "toy")]))
    inputs = processor.normalise(processor.inputs([seen], 7))
    with torch.inference_mode():
        learnt, acted = vla.read(batch, layer, logits=insulate), vla.read(inputs, layer)
        written = vla.read(batch, None, logits=True).logits
    count = acted.states.shape[1]
    torch.testing.assert_close(learnt.states[:, :count], acted.states, rtol=1e-4, atol=1e-4)
    assert not learnt.prompt[:, count:].any()
    if insulate:
        torch.testing.assert_close(learnt.logits, written, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_there_is_refused_in_training_too(
    config: dict[str, Any], build: Callable[..., VLA]
) -> None:
    head = FlowHead(2, 7, width=16, depth=1, heads=2, insulate=True, vocab_size=768)
    vla = build({**config, "action_head": describe(head, USUAL_HEAD)})
    processor = Processor(head, image_size=56, means=STATISTICS, stds=STATISTICS)
    seen = Observation({"primary": np.zeros((56, 56, 3), np.uint8)}, "lift the red cube")
    batch = processor.normalise(processor.collate([Step(seen, np.zeros((2, 7), np.float32), "toy")]))
    with pytest.raises(ValueError, match="layer 3 cannot be read: the language model has 2"):
        vla.read(batch, 3, logits=True)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (FlowHead(2, 7, width=16, depth=1, heads=2), {"steps": 0}, "steps=0 must be at least 1"),
        (FastHead(vocab_size=768, action_chunk=2), {"temperature": -1.0}, r"temperature=-1\.0 is below 0"),
    ],
)
def test_an_impossible_option_is_refused_before_the_first_action(
    vla: VLA, head: ActionHead, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        head.decoder(vla, Acting(normalise=lambda pixels: pixels, options=options))
