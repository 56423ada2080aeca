"""Several views and proprioception in the model: every way through it gives the same, and says what is missing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openvla_lightning.action_head import Acting, TokenHead
from openvla_lightning.model import VLA
from openvla_lightning.processor import Processor
from openvla_lightning.types import Batch, Observation, Step

MEANS, STDS = [[0.5] * 3, [0.25] * 3], [[0.5] * 3, [0.125] * 3]
CAMERAS, P, D = ["primary", "wrist"], 5, 4


def processor_of(head: TokenHead) -> Processor:
    return Processor(head, image_size=56, means=MEANS, stds=STDS, cameras=CAMERAS, history=2, proprio=True)


def observations(processor: Processor, count: int = 3) -> list[Observation]:
    rng = np.random.default_rng(0)
    words = ["stop", "lift the red cube", "push the yellow can to the left"]
    images = [{view: rng.integers(0, 256, (56, 56, 3), np.uint8) for view in processor.views} for _ in range(count)]
    return [Observation(seen, words[i % 3], rng.normal(size=P).astype(np.float32)) for i, seen in enumerate(images)]


@pytest.fixture
def model(config: dict[str, Any], build: Callable[..., VLA]) -> VLA:
    return build(config | {"proprio_dim": P})


@pytest.fixture
def head() -> TokenHead:
    return TokenHead(vocab_size=768, action_chunk=2)


@pytest.fixture
def batch(head: TokenHead) -> Batch:
    processor = processor_of(head)
    steps = [
        Step(seen, np.linspace(-1, 1, 2 * D, dtype=np.float32).reshape(2, D), "toy", proprio=seen.proprio)
        for seen in observations(processor)
    ]
    return processor.normalise(processor.collate(steps))


def test_pixels_stand_view_by_view_and_tower_by_tower(head: TokenHead) -> None:
    processor = processor_of(head)
    seen = observations(processor)
    inputs = processor.inputs(seen, D, [o.proprio for o in seen])
    assert inputs.pixel_values.shape == (3, 3 * 4, 56, 56)
    assert inputs.pixel_values.dtype == torch.uint8
    floats = processor.normalise(inputs).pixel_values
    assert floats.shape == (3, 3 * 2 * 4, 56, 56)
    for place, view in enumerate(processor.views):
        image = torch.from_numpy(seen[1].images[view]).permute(2, 0, 1).float() / 255
        for tower in range(2):
            own = floats[1, 6 * place + 3 * tower : 6 * place + 3 * tower + 3]
            torch.testing.assert_close(own, (image - MEANS[tower][0]) / STDS[tower][0])


@torch.no_grad()
def test_every_view_and_the_state_move_the_logits(model: VLA, head: TokenHead, batch: Batch) -> None:
    def logits(given: Batch) -> Tensor:
        out = model(
            pixel_values=given.pixel_values, input_ids=given.input_ids, places=given.places, proprio=given.proprio
        )
        patches = model.vision_backbone.num_patches
        assert out.num_patches == 4 * patches + 1
        return out.logits

    whole = logits(batch)
    for view in range(4):
        dark = batch.pixel_values.clone()
        dark[:, 6 * view : 6 * view + 6] = 0.0
        assert (logits(replace(batch, pixel_values=dark)) - whole).abs().max() > 1e-3
    assert batch.proprio is not None
    assert (logits(replace(batch, proprio=batch.proprio + 0.5)) - whole).abs().max() > 1e-3
    states = model.llm.logits(model.states(batch))
    torch.testing.assert_close(states, whole, msg="states and forward are one sequence")


def test_fast_and_plain_decoding_agree(model: VLA, head: TokenHead) -> None:
    processor = processor_of(head)
    seen = observations(processor)
    inputs = processor.inputs(seen, D, [o.proprio for o in seen])
    fast, plain = (
        head.decoder(model, Acting(normalise=processor.transform.normalise, static=static)) for static in (True, False)
    )
    actions = fast(inputs, D, None)
    assert actions.shape == (3, 2, D)
    assert torch.equal(actions, plain(inputs, D, None))
    alone = torch.cat([fast(inputs.rows(row, row + 1), D, None) for row in range(3)])
    assert torch.equal(actions, alone)


def test_what_is_missing_is_named(model: VLA, vla: VLA, head: TokenHead, batch: Batch) -> None:
    with pytest.raises(ValueError, match="reads 5 numbers of proprioception, it was given none"):
        head.loss(model, replace(batch, proprio=None))
    with pytest.raises(ValueError, match="it was given 2"):
        head.loss(model, replace(batch, proprio=torch.zeros(3, 2)))
    processor = processor_of(head)
    (seen,) = observations(processor, 1)
    few = {view: image for view, image in seen.images.items() if view != "wrist@-1"}
    with pytest.raises(ValueError, match=r"there is no image wrist@-1, but primary, wrist, primary@-1"):
        processor.inputs([replace(seen, images=few)], D, [seen.proprio])
    with pytest.raises(ValueError, match=r"data\.proprio=true"):
        processor.inputs([seen], D)
    assert "proprio_projector.fc1.weight" not in vla.state_dict(), "only where it is asked for"


def test_the_released_layout_refuses_what_it_cannot_hold(model: VLA, vla: VLA, head: TokenHead, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"no place for proprio_projector, the views primary, wrist, .* beside tokens"):
        model.save_pretrained(tmp_path / "state", processor_of(head))
    assert not (tmp_path / "state").exists()
    processor = Processor(head, image_size=56, means=MEANS, stds=STDS, cameras=["wrist"])
    vla.save_pretrained(tmp_path / "chunk", processor)
    again = Processor.from_pretrained(tmp_path / "chunk")
    assert again.cameras == ("wrist",)
    assert again.action_head.action_chunk == 2


def test_checkpoints_before_views_still_say_their_camera() -> None:
    head = TokenHead(vocab_size=768)
    processor = Processor(head, image_size=56, means=MEANS, stds=STDS)
    old = {name: value for name, value in processor.config.items() if name not in ("cameras", "history", "proprio")}
    old["action_head"] = {"num_bins": 256, "vocab_size": 768}
    again = Processor.from_config({**old, "camera": "wrist"})
    assert again.views == ("wrist",)
    assert again.action_head.config == head.config
    assert Processor.from_config(again.config).views == ("wrist",)
