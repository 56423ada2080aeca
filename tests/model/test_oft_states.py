"""The hidden states of the released OpenVLA-OFT code, and what mistakes in them would look like."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oft_world import Case, cases, close
from torch import Tensor

from openvla_lightning.model.attention import ATTENTIONS
from openvla_lightning.types import IGNORE_INDEX, Inputs

pytestmark = pytest.mark.golden
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skip("needs a GPU and flash-attn") if name.startswith("flash") else ())
    for name in ATTENTIONS
]


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def asked(case: Case, batch: Any) -> dict[str, Tensor | None]:
    """What the head of this variant hands to `states` in the released training step."""
    dim = case.vla.llm.dim
    slots: Tensor = torch.zeros(len(batch.input_ids), case.places, dim)
    if case.kind != "diffusion":
        return {"slots": slots}
    from openvla_lightning.action_head.diffusion import time_embedding

    network: Any = case.vla.action_head
    return {
        "slots": network.slots(case["fwd/noisy_actions"]),
        "extra": time_embedding(case["fwd/timesteps"], dim)[:, None],
    }


class Recorded(dict[str, Any]):
    """What goes through the language model and the towers while `states` runs."""

    def __init__(self, vla: Any) -> None:
        super().__init__(layers=[])
        keep = self["layers"].append
        handles = [
            vla.llm.model.layers[0].register_forward_pre_hook(lambda m, a: self.update(inputs_embeds=a[0])),
            vla.projector.register_forward_hook(lambda m, a, out: self.update(features=a[0], projected=out)),
            vla.llm.model.norm.register_forward_hook(lambda m, a, out: keep(out)),
            *(layer.register_forward_hook(lambda m, a, out: keep(out)) for layer in vla.llm.model.layers[:-1]),
        ]
        self.handles = handles

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("attention", BACKENDS)
def test_training_batch(case: Case, attention: str) -> None:
    case.vla.llm.attention = attention
    batch = case.batch
    with torch.no_grad(), Recorded(case.vla) as seen:
        hidden = case.vla.states(batch, **asked(case, batch), causal=False)
    close(hidden, case["fwd/action_hidden"], 2e-4)
    close(seen["features"], case["fwd/patch_features"], 1e-4)
    close(seen["projected"].reshape(len(hidden), -1, hidden.shape[2]), case["fwd/projected_patches"], 1e-4)
    close(seen["inputs_embeds"], case["fwd/inputs_embeds"], 1e-4)
    real = case["fwd/mm_attention_mask"].bool()
    *inner, last = zip(seen["layers"], case["fwd/hidden_states"][1:], strict=True)
    # `sdpa` computes the last layer only at the places, which are compared above
    for ours, theirs in inner if attention == "sdpa" else [*inner, last]:
        close(ours[real], theirs[real], 5e-4, 2e-4)  # two correct stacks differ so, where nobody reads


@pytest.mark.parametrize("attention", BACKENDS)
def test_one_sample_is_what_it_is_in_a_padded_batch(case: Case, attention: str) -> None:
    case.vla.llm.attention = attention
    case.vla.eval()  # in training, as released, FiLM sees a batch's padding
    batch = case.batch
    with torch.no_grad():
        together = case.vla.states(batch, **asked(case, batch), causal=False)
    assert not batch.attention_mask.all(), "no row of this batch is padded"
    given = asked(case, batch)
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        alone = Inputs(
            pixel_values=batch.pixel_values[row : row + 1],
            input_ids=batch.input_ids[row : row + 1, :length],
            attention_mask=batch.attention_mask[row : row + 1, :length],
            places=batch.places[row : row + 1],
            proprio=None if batch.proprio is None else batch.proprio[row : row + 1],
        )
        own = {name: None if t is None else t[row : row + 1] for name, t in given.items()}
        with torch.no_grad():
            close(case.vla.states(alone, **own, causal=False)[0], together[row], 2e-4)  # type: ignore[arg-type]
    case.vla.train()


def test_places_are_those_the_released_code_reads(case: Case) -> None:
    prefix = int(case["num_patches"])
    assert torch.equal(case.batch.places + prefix, case["fwd/action_hidden_positions"])


def test_after_one_layer_all_places_look_alike(case: Case) -> None:
    """Nothing but the rotary positions tells zero embeddings apart, and these act on queries and keys alone."""
    if case.kind == "diffusion":
        pytest.skip("places hold noisy actions")
    batch = case.batch
    with torch.no_grad(), Recorded(case.vla) as seen:
        case.vla.states(batch, **asked(case, batch), causal=False)
    first = seen["layers"][0]
    rows = torch.arange(len(first))[:, None]
    written = first[rows, case["fwd/action_hidden_positions"] + 1]
    assert (written - written[:, :1]).abs().max() < 1e-5


@pytest.mark.parametrize("mistake", ["causal", "read one later", "places not emptied", "padding seen", "no end token"])
def test_a_mistake_is_noticed(case: Case, mistake: str) -> None:
    batch = case.batch
    given: dict[str, Any] = asked(case, batch)
    causal = mistake == "causal"
    if mistake == "read one later":
        batch = replace(batch, places=batch.places + 1)
    if mistake == "places not emptied":
        given["slots"] = case.vla.llm.embed(batch.input_ids.gather(1, batch.places + 1))
    if mistake == "padding seen":
        batch = replace(batch, attention_mask=torch.ones_like(batch.attention_mask))
    if mistake == "no end token":
        last = batch.attention_mask.sum(1) - 1
        mask = batch.attention_mask.clone()
        mask[torch.arange(len(last)), last] = False
        batch = replace(batch, attention_mask=mask)
    with torch.no_grad():
        hidden = case.vla.states(batch, **given, causal=causal)
    error = (hidden - case["fwd/action_hidden"]).abs().amax((1, 2))
    noticed = error > 100 * 2e-4
    assert noticed.any() if mistake == "padding seen" else noticed.all(), error


def test_film(case: Case) -> None:
    if not case.meta["film"]:
        pytest.skip("no FiLM in this variant")
    batch, told = case.batch, []
    outputs: dict[str, list[Any]] = {}
    handles = []
    for tower in ("featurizer", "fused_featurizer"):
        for block in getattr(case.vla.vision_backbone, tower).blocks:
            for name, layer in (("gamma", block.scale), ("beta", block.shift), ("block", block)):
                keep = outputs.setdefault(f"{tower}/{name}", []).append
                handles.append(layer.register_forward_hook(lambda m, a, out, keep=keep: keep(out)))
            handles.append(block.scale.register_forward_hook(lambda m, a, out: told.append(a[0])))
    with torch.no_grad():
        case.vla.states(batch, **asked(case, batch), causal=False)
    for handle in handles:
        handle.remove()
    views, rows = case["image"].shape[1], len(batch.input_ids)
    close(told[0].reshape(rows, views, -1)[:, 0], case["film/avg_language_embedding"], 1e-4)
    for tower in ("featurizer", "fused_featurizer"):
        for name in ("gamma", "beta"):
            ours = torch.stack(outputs[f"{tower}/{name}"]).unflatten(1, (rows, views))
            assert torch.equal(ours, ours[:, :, :1].expand_as(ours)), "views differ"
            close(ours[:, :, 0], case[f"film/{tower}/{name}"][: len(ours)], 1e-4)
        ours = torch.stack(outputs[f"{tower}/block"]).unflatten(1, (rows, views))[:, :, 0, ::16]
        close(ours, case[f"film/{tower}/block_out_primary_every16"][: len(ours)], 1e-4)
    case.vla.film = "masked"
    try:
        with torch.no_grad():
            told.clear()
            handle = case.vla.vision_backbone.featurizer.blocks[0].scale.register_forward_hook(
                lambda m, a, out: told.append(a[0])
            )
            case.vla.see(batch, case.places)
            handle.remove()
    finally:
        case.vla.film = "released"
    close(told[0].reshape(rows, views, -1)[:, 0], case["film/avg_language_embedding_if_pads_excluded"], 1e-4)


@pytest.mark.parametrize("attention", BACKENDS)
def test_attention_in_both_directions(case: Case, attention: str) -> None:
    if not case.has("attn/"):
        pytest.skip("this variant has no numbers of the language model alone")
    llm = case.vla.llm
    llm.attention = attention
    embeddings, mask = case["attn/inputs_embeds"], case["attn/attention_mask"].bool()
    with torch.no_grad():
        for given, expected in ((mask, "attn/hidden_states"), (None, "attn/hidden_states_no_mask")):
            states = llm.hidden_states(embeddings, given, causal=False)
            for ours, theirs in zip(states, case[expected], strict=True):
                close(ours, theirs, 2e-4)
            close(llm.decode(embeddings, given, causal=False), case[expected][-1], 2e-4)
        causal = llm.decode(embeddings)
        assert (causal - case["attn/hidden_states_no_mask"][-1]).abs().max() > 0.1
        # and it is not stuck in both directions afterwards
        close(causal[mask], case["attn/PITFALL_hidden_last_with_output_attentions"][mask], 2e-4)


@pytest.mark.parametrize("attention", BACKENDS)
def test_who_sees_whom(case: Case, attention: str) -> None:
    if not case.has("attn/"):
        pytest.skip("this variant has no numbers of the language model alone")
    llm = case.vla.llm
    llm.attention = attention
    embeddings, mask = case["attn/inputs_embeds"], case["attn/attention_mask"].bool()
    for given, expected in ((mask, "attn/depends_on_masked"), (None, "attn/depends_on_no_mask")):
        ones = llm.model.layers
        try:
            llm.model.layers = ones[:1]
            base = _first(llm, embeddings, given)
            for j in range(embeddings.shape[1]):
                changed = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
                for size in (-2.0, -0.5, 0.5, 2.0):  # attention here is sharp: not every change is seen by everyone
                    moved = embeddings.clone()
                    moved[:, j] = size * moved[:, j].flip(-1)
                    changed |= (_first(llm, moved, given) != base).any(2)
                np.testing.assert_array_equal(changed.numpy(), case[expected][:, :, j].numpy())
        finally:
            llm.model.layers = ones


def _first(llm: Any, embeddings: Tensor, mask: Tensor | None) -> Tensor:
    """Output of the first layer."""
    kept: list[Tensor] = []
    handle = llm.model.layers[0].register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        llm.decode(embeddings, mask, causal=False)
    handle.remove()
    return kept[0]


def test_labels_agree_with_the_released_masks(case: Case) -> None:
    batch = case.batch
    written = torch.zeros_like(batch.attention_mask)
    written.scatter_(1, batch.places + 1, True)
    assert torch.equal(written, case["mask/current_action"] | case["mask/next_actions"])
    assert (batch.labels[written] != IGNORE_INDEX).all()
