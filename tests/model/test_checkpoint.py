"""Every source of weights gives the same model; what does not fit is refused in one error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvla_lightning
from openvla_lightning import VLA, Processor
from openvla_lightning.action_head import TokenHead
from openvla_lightning.model.checkpoint import CheckpointError, check_source, load_checkpoint, load_weights
from openvla_lightning.strategy import LoRA, TrainOnly


def same(a: VLA, b: VLA) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


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


def write_ckpt(path: Path, vla: VLA, strategy: Any, norm_stats: dict[str, Any]) -> None:
    """As VLAModule does."""
    means, stds = [[0.5] * 3] * 2, [[0.5] * 3] * 2
    processor = Processor(TokenHead(vocab_size=768), image_size=56, means=means, stds=stds, pad_token_id=0)
    torch.save(
        {
            "state_dict": {f"vla.{k}": v for k, v in vla.state_dict().items()} | {"other": torch.zeros(1)},
            "hyper_parameters": {"seed": 7},
            "openvla_lightning": {
                "version": openvla_lightning.__version__,
                "vla": vla.config,
                "processor": processor.config,
                "action_head": processor.action_head.config,
                "strategy": strategy.config if strategy else None,
                "normalisation": "quantile",
                "norm_stats": norm_stats,
            },
        },
        path,
    )


def test_folder_round_trip(vla: VLA, folder: Path, tmp_path: Path) -> None:
    loaded = VLA.from_pretrained(folder)
    assert same(loaded, vla)
    assert loaded.norm_stats == vla.norm_stats
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_shards(vla: VLA, folder: Path, tmp_path: Path) -> None:
    vla.save_pretrained(tmp_path)
    vla.save_pretrained(tmp_path, max_shard_size=50_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in vla.state_dict().values())
    assert same(VLA.from_pretrained(tmp_path), vla)
    vla.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_sequence_fusion_and_other_layers_survive(
    config: dict[str, Any], build: Callable[..., VLA], tmp_path: Path
) -> None:
    config["projector"]["kind"] = "linear"
    config["vision_backbone"] |= {"fusion": "sequence", "feature_layer": -1}
    config["vision_backbone"]["towers"]["dino"]["embed_dim"] = 32
    vla = build(config)
    vla.save_pretrained(tmp_path)
    loaded = VLA.from_pretrained(tmp_path)
    assert same(loaded, vla)
    assert loaded.vision_backbone.config == vla.vision_backbone.config
    assert "the released code lacks" in (tmp_path / "README.md").read_text()


def test_tied_models_round_trip(config: dict[str, Any], build: Callable[..., VLA], tmp_path: Path) -> None:
    config["llm"]["architecture"]["tie_word_embeddings"] = True
    vla = build(config)
    vla.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = VLA.from_pretrained(tmp_path)
    assert same(loaded, vla)
    assert loaded.llm.lm_head.weight is loaded.llm.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_placed_while_loading(vla: VLA, folder: Path, dtype: torch.dtype) -> None:
    loaded = VLA.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.llm.lm_head.weight, vla.llm.lm_head.weight.to(dtype))


def test_loaded_weights_do_not_depend_on_the_file(vla: VLA, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    loaded = VLA.from_pretrained(copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(20_000)
        file.write(b"\0" * 100_000)
    assert same(loaded, vla)


def test_old_layer_scale_names(vla: VLA, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    renamed = {k.replace("scale_factor", "gamma"): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    assert same(VLA.from_pretrained(tmp_path), vla)


def test_pytorch_bin(vla: VLA, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(vla.state_dict(), tmp_path / "pytorch_model.bin")
    assert same(VLA.from_pretrained(tmp_path), vla)


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


def test_init_from_in_the_constructor(vla: VLA, folder: Path, config: dict[str, Any]) -> None:
    from openvla_lightning.model.llm import CausalLM
    from openvla_lightning.model.projector import FusedMLP
    from openvla_lightning.model.vision_backbone import VisionBackbone

    def build() -> VLA:
        return VLA(
            vision_backbone=lambda: VisionBackbone(**config["vision_backbone"], pretrained=True),
            projector=FusedMLP,
            llm=lambda: CausalLM(**config["llm"], pretrained=True),
            init_from=folder,
        )

    started = build()
    assert same(started, vla)
    assert started.norm_stats == vla.norm_stats
    started(
        pixel_values=torch.zeros(1, 6, 56, 56), input_ids=torch.ones(1, 2, dtype=torch.long)
    ).logits.sum().backward()
    with torch.device("meta"):
        assert {p.device.type for p in build().parameters()} == {"meta"}


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
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
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


def test_saving_with_adapters_is_refused(config: dict[str, Any], build: Callable[..., VLA], tmp_path: Path) -> None:
    vla = build(config)
    LoRA(rank=2).apply(vla)
    with pytest.raises(ValueError, match="merge"):
        vla.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_problems_in_one_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["projector.fc1.bias"]
    tensors["projector.fc2.weight"] = tensors["projector.fc2.weight"].T.contiguous()
    tensors["language_model.model.norm.weight"] = tensors["language_model.model.norm.weight"].half()
    tensors["stray"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        VLA.from_pretrained(tmp_path)
    for text in ("projector.fc1.bias: missing", "projector.fc2.weight: is [", "norm.weight: is torch.float16", "stray"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no file or folder"),
        ("/nowhere/last.ckpt", "no file or folder"),
        ("prism-dinosiglip-224px+7b", "hf download TRI-ML/prismatic-vlms"),
        ("nobody/no-such-vla", "hf download nobody/no-such-vla"),
    ],
)
def test_missing_sources_say_where_to_get_them(monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=message):
        check_source(source)
    with pytest.raises(FileNotFoundError, match=message):
        VLA.from_pretrained(source)


@pytest.mark.parametrize("tower", ["dino", "siglip"])
def test_single_encoders_round_trip(
    config: dict[str, Any], build: Callable[..., VLA], tmp_path: Path, tower: str
) -> None:
    """As openvla-7b-v01: one tower, two linear layers, no `fused_featurizer`."""
    config["vision_backbone"]["towers"] = {tower: config["vision_backbone"]["towers"][tower]}
    config["projector"]["kind"] = "mlp"
    vla = build(config)
    vla.save_pretrained(tmp_path)
    loaded = VLA.from_pretrained(tmp_path)
    assert same(loaded, vla)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["use_fused_vision_backbone"] is False
    assert written["arch_specifier"] == "no-align+gelu-mlp"
    assert not any(key.startswith(("vision_backbone.fused", "projector.fc3")) for key in loaded.state_dict())
    assert len(Processor.from_pretrained(tmp_path).config["means"]) == 1
