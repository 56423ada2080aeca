"""What training writes, ours and the released code's, loads as the released layout does."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from written import same, train_a_little, write_ckpt

from openvla_lightning import VLA, Processor
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.model.checkpoint import CheckpointError, load_checkpoint, load_weights
from openvla_lightning.strategy import LoRA, TrainOnly


def prismatic_state(vla: VLA, frozen_vision: bool = False) -> dict[str, Any]:
    """The released training code's layout and names."""
    parts: dict[str, dict[str, Tensor]] = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    numbers = {"fc1": "0", "fc2": "2", "fc3": "4"}
    for key, value in vla.state_dict().items():
        part, _, name = key.partition(".")
        if part == "projector":
            layer, _, kind = name.partition(".")
            parts["projector"][f"projector.{numbers[layer]}.{kind}"] = value
        elif part == "language_model":
            parts["llm_backbone"][f"llm.{name}"] = value
        else:
            tower = {"featurizer": "dino_featurizer", "fused_featurizer": "siglip_featurizer"}
            attribute, _, rest = name.partition(".")
            parts["vision_backbone"][f"{tower[attribute]}.{rest.replace('scale_factor', 'gamma')}"] = value
    if frozen_vision:
        del parts["vision_backbone"]
    return {"model": parts}


@pytest.fixture
def llama_config(config: dict[str, Any]) -> dict[str, Any]:
    """A small model with Llama's vocabulary, as Prismatic runs have it."""
    config["llm"]["name"] = "meta-llama/Llama-2-7b-hf"
    config["llm"]["vocab_size"] = 32000
    config["llm"]["architecture"] |= {"vocab_size": 32064, "pad_token_id": 32000}
    return config


@pytest.fixture
def trained(llama_config: dict[str, Any], build: Callable[..., VLA], vla: VLA) -> VLA:
    model = build(llama_config)
    model.norm_stats = vla.norm_stats
    return model


@pytest.fixture
def run_folder(trained: VLA, tmp_path: Path) -> Path:
    """A Prismatic run; `text_config` and `timm_model_kwargs` stand for sizes that real runs have by name."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(prismatic_state(trained), run / "checkpoints" / "step-000010-epoch-00-loss=1.0.pt")
    towers = trained.vision_backbone.towers.values()
    model = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "image_sizes": [56, 56],
        "timm_model_kwargs": [{k: v for k, v in tower.items() if k != "id"} for tower in towers],
        "text_config": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **trained.llm.architecture},
    }
    (run / "config.json").write_text(json.dumps({"model": model}))
    (run / "dataset_statistics.json").write_text(json.dumps(trained.norm_stats))
    return run


@pytest.mark.parametrize("as_file", [False, True])
def test_prismatic_run(trained: VLA, run_folder: Path, as_file: bool) -> None:
    path = next((run_folder / "checkpoints").glob("*.pt")) if as_file else run_folder
    loaded = VLA.from_pretrained(path)
    assert same(loaded, trained)
    assert loaded.norm_stats == trained.norm_stats
    assert Processor.from_pretrained(path).config["image_size"] == 56


def test_init_from_any_source(trained: VLA, run_folder: Path, llama_config: dict[str, Any], tmp_path: Path) -> None:
    ckpt, folder = tmp_path / "last.ckpt", tmp_path / "folder"
    trained.save_pretrained(folder)
    write_ckpt(ckpt, trained, None, trained.norm_stats)
    for path in (folder, run_folder / "checkpoints", run_folder, ckpt):
        if path.name == "checkpoints":
            path = next(path.glob("*.pt"))
        fresh = VLA.from_config(llama_config)
        assert not same(fresh, trained)
        load_weights(fresh, path)
        assert same(fresh, trained)
        assert all(p.requires_grad and p.device.type == "cpu" for p in fresh.parameters())


def test_prismatic_run_with_frozen_vision(trained: VLA, run_folder: Path, llama_config: dict[str, Any]) -> None:
    path = next((run_folder / "checkpoints").glob("*.pt"))
    torch.save(prismatic_state(trained, frozen_vision=True), path)
    with pytest.raises(CheckpointError, match=r"vision_backbone.featurizer.cls_token: missing"):
        VLA.from_pretrained(run_folder)
    fresh = VLA.from_config(llama_config)
    load_weights(fresh, path, frozen_vision=lambda: trained.vision_backbone)
    assert same(fresh, trained)


@pytest.mark.parametrize("strategy", [None, TrainOnly(["llm"]), LoRA(rank=4)])
def test_our_checkpoints(config: dict[str, Any], build: Callable[..., VLA], tmp_path: Path, strategy: Any) -> None:
    trained = build(config)
    stats = {"toy": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}
    if strategy is not None:
        strategy.apply(trained)
        train_a_little(trained)
    path = tmp_path / "last.ckpt"
    write_ckpt(path, trained, strategy, stats)
    vla, processor, norm_stats = load_checkpoint(path)
    assert norm_stats["toy"]["action"] == stats["toy"]["action"]
    assert norm_stats["toy"]["normalisation"] == "quantile"
    assert processor.config["image_size"] == 56
    assert list(vla.state_dict()) == list(build(config).state_dict())
    sample = {"pixel_values": torch.randn(1, 6, 56, 56), "input_ids": torch.tensor([[1, 300, 301]])}
    with torch.no_grad():
        torch.testing.assert_close(vla(**sample).logits, trained.eval()(**sample).logits, atol=2e-4, rtol=1e-4)
    vla.save_pretrained(tmp_path / "released", processor)
    again, other, _ = load_checkpoint(tmp_path / "released")
    assert same(again, vla)
    assert other.config == processor.config
    card = (tmp_path / "released" / "README.md").read_text()
    assert "toy" in card
    assert '"seed": 7' in card


def test_a_run_and_a_folder_of_runs_mean_their_newest_checkpoint(tmp_path: Path) -> None:
    for age, name in enumerate(["new/checkpoints/step_000100.ckpt", "old/checkpoints/step_000900.ckpt"]):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert newest_checkpoint(tmp_path) == tmp_path / "new/checkpoints/step_000100.ckpt"
    assert newest_checkpoint(tmp_path / "old") == tmp_path / "old/checkpoints/step_000900.ckpt"
