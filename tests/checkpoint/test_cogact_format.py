"""CogACT runs as its released code lays them out: read by names and shapes, written, and refused with a reason."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_checkpoints import prismatic_state
from written import same

from openvla_lightning import VLA, Policy, Processor
from openvla_lightning.action_head import ActionHead, TokenHead
from openvla_lightning.action_head.cogact import CogACTHead
from openvla_lightning.checkpoint.cogact import CogACT, save_cogact
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.formats import describe

HEAD = CogACTHead(action_chunk=4, hidden=384, depth=1, heads=4)
"""As wide as the released S, whose number of heads is known; one block of it."""
HALVES = [[0.5, 0.5, 0.5]] * 2


def processor_of(head: ActionHead = HEAD, **settings: Any) -> Processor:
    return Processor(head, image_size=56, means=HALVES, stds=HALVES, **settings)


@pytest.fixture
def trained(config: dict[str, Any], build: Callable[..., VLA], vla: VLA) -> VLA:
    """A small model with Llama's vocabulary and CogACT's head."""
    from openvla_lightning.plugins import USUAL_HEAD
    from openvla_lightning.plugins import describe as as_plain_data

    config["llm"]["name"] = "meta-llama/Llama-2-7b-hf"
    config["llm"]["vocab_size"] = 32000
    config["llm"]["architecture"] |= {"vocab_size": 32064, "pad_token_id": 32000, "rms_norm_eps": 1e-6}
    config["action_head"] = as_plain_data(HEAD, USUAL_HEAD)
    model = build(config)
    model.norm_stats = vla.norm_stats
    return model


def write_as_released(run: Path, vla: VLA, averaged: bool = False) -> Path:
    """The layout of microsoft/CogACT: `action_model` beside Prismatic's parts, and nothing that says its size."""
    save_cogact(vla, processor_of(), run)
    config = json.loads((run / "config.json").read_text())
    for ours in ("openvla_lightning", "action_model_type", "future_action_window_size"):
        del config[ours]
    (run / "config.json").write_text(json.dumps(config))
    (path,) = (run / "checkpoints").glob("*.pt")
    parts = torch.load(path)["model"]
    plain = {k: v for k, v in vla.state_dict().items() if not k.startswith("action_head.")}
    wanted = prismatic_state(type("Plain", (), {"state_dict": lambda self: plain})())["model"]  # type: ignore[arg-type]
    for part, tensors in wanted.items():
        assert list(parts[part]) == list(tensors), "names are those of the released training code"
        assert all(torch.equal(parts[part][name], tensor) for name, tensor in tensors.items())
    if averaged:
        parts["ema_diffusion"] = {f"net.{name}": tensor + 1 for name, tensor in vla.action_head.state_dict().items()}
    torch.save({"model": parts}, path)
    return path


@pytest.mark.parametrize("averaged", [False, True])
def test_a_released_run_is_read_by_names_and_shapes(trained: VLA, tmp_path: Path, averaged: bool) -> None:
    path = write_as_released(tmp_path / "run", trained, averaged)
    for place in (path, tmp_path / "run"):
        assert isinstance(describe(place).format, CogACT)
        loaded = VLA.from_pretrained(place)
        assert same(loaded, trained)
        assert loaded.norm_stats == trained.norm_stats
    head = Processor.from_pretrained(path, tokenizer="tiny").action_head
    assert isinstance(head, CogACTHead)
    assert head.config == {**HEAD.config, "action_chunk": 4, "guidance": 1.5, "steps": 10}


def test_written_and_read_again_it_acts_the_same(trained: VLA, tmp_path: Path) -> None:
    save_cogact(trained, processor_of(), tmp_path / "run", dtype=torch.bfloat16)
    loaded = VLA.from_pretrained(tmp_path / "run", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name], rtol=1e-2, atol=1e-2)
    save_cogact(trained, processor_of(crop_area=0.9, prompt="vicuna", cameras=["wrist"]), tmp_path / "exact")
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    processor = Processor.from_pretrained(tmp_path / "exact", tokenizer="tiny")
    assert (processor.transform.crop_area, processor.prompt, processor.cameras) == (0.9, "vicuna", ("wrist",))
    policies = (
        Policy(model, processor, trained.norm_stats, device="cpu", dtype="float32", seed=1)
        for model in (trained, VLA.from_pretrained(tmp_path / "exact"))
    )
    before, after = (policy.act(picture, "pick up the cup") for policy in policies)
    np.testing.assert_array_equal(after, before)


def test_what_is_no_cogact_model_is_told(trained: VLA, vla: VLA, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a CogACT run holds a CogACT head, not a TokenHead"):
        save_cogact(trained, processor_of(TokenHead()), tmp_path / "a")
    with pytest.raises(ValueError, match="has no name for"):
        save_cogact(vla, processor_of(), tmp_path / "b")
    path = write_as_released(tmp_path / "run", trained)
    content = torch.load(path)
    content["model"]["action_model"] = {
        name: tensor.repeat_interleave(2, -1) for name, tensor in content["model"]["action_model"].items()
    }
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="should be"):
        VLA.from_pretrained(path)
    del content["model"]["action_model"]["net.positional_embedding"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"action_model.net.positional_embedding: missing"):
        VLA.from_pretrained(path)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"proprio_dim": 5}, {"proprio": True}, "has no place for proprio_projector"),
        ({"film": "masked"}, {}, "has no place for film"),
        ({}, {"cameras": ["primary", "wrist"]}, "has no place for the views primary, wrist"),
        ({"vision_backbone": {"feature_layer": -1}}, {}, "has no name for {'feature_layer': -1}"),
        ({"projector": {"kind": "mlp"}}, {}, "has no name for {'kind': 'mlp'}"),
    ],
)
def test_what_the_released_code_would_read_wrongly_is_not_written(
    config: dict[str, Any],
    build: Callable[..., VLA],
    tmp_path: Path,
    changes: dict[str, Any],
    settings: dict[str, Any],
    message: str,
) -> None:
    config["llm"]["name"] = "meta-llama/Llama-2-7b-hf"
    config["action_head"] = {"class": "openvla_lightning.action_head.cogact.CogACTHead", **HEAD.config}
    config["vision_backbone"] |= changes.pop("vision_backbone", {})
    model = build({**config, **changes})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        save_cogact(model, processor_of(**settings), tmp_path / "run")
    assert "cannot load" not in str(error.value), "it was to be written"
    assert not (tmp_path / "run").exists()
