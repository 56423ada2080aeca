"""Every source of weights gives the same model; what does not fit is refused in one error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from written import same

from openvla_lightning import VLA, Processor
from openvla_lightning.checkpoint.load import start_from
from openvla_lightning.checkpoint.save import usage
from openvla_lightning.model.checkpoint import CheckpointError, check_source
from openvla_lightning.strategy import LoRA
from openvla_lightning.types import Observation


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
    assert {p.device.type for p in started.parameters()} == {"meta"}, "building loads no weights"
    start_from(started)
    assert same(started, vla)
    assert started.norm_stats == vla.norm_stats
    started(
        pixel_values=torch.zeros(1, 6, 56, 56), input_ids=torch.ones(1, 2, dtype=torch.long)
    ).logits.sum().backward()
    with torch.device("meta"):
        start_from(planned := build())
        assert {p.device.type for p in planned.parameters()} == {"meta"}


def test_saving_merges_adapters_and_leaves_the_model_alone(
    config: dict[str, Any], build: Callable[..., VLA], batch: dict[str, Any], tmp_path: Path
) -> None:
    vla = build(config)
    LoRA(rank=2, init=False).apply(vla)
    live = vla(**batch).logits
    names = list(vla.state_dict())
    vla.save_pretrained(tmp_path)
    assert list(vla.state_dict()) == names
    assert torch.equal(vla(**batch).logits, live)
    saved = VLA.from_pretrained(tmp_path)
    assert list(saved.state_dict()) == list(build(config).state_dict())
    torch.testing.assert_close(saved(**batch).logits, live, atol=2e-4, rtol=1e-4)
    assert (live - build(config)(**batch).logits).abs().max() > 0.01, "these adapters matter"


def test_all_problems_in_one_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["projector.fc1.bias"]
    tensors["projector.fc2.weight"] = tensors["projector.fc2.weight"].T.contiguous()
    tensors["stray"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        VLA.from_pretrained(tmp_path)
    for text in ("projector.fc1.bias: missing", "projector.fc2.weight: is [", "stray"):
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


def test_towers_with_counters_round_trip(config: dict[str, Any], tmp_path: Path) -> None:
    """Batch normalisation keeps whole numbers beside its weights."""
    config["vision_backbone"] = {"towers": {"cnn": {"id": "resnet18"}}, "image_size": 64}
    config["projector"]["kind"] = "mlp"
    vla = VLA.from_config(config)
    vla(pixel_values=torch.randn(2, 3, 64, 64), input_ids=torch.ones(2, 3, dtype=torch.long))
    vla.save_pretrained(tmp_path)
    assert same(VLA.from_pretrained(tmp_path), vla)


@pytest.mark.parametrize(
    ("inputs", "asked"),
    [
        ({"crop_area": 0.9}, {"act": ("picture", "put the spoon on the towel")}),
        ({"action_chunk": 8}, {"act_chunk": ({"primary": "picture"}, None)}),
        (
            {"cameras": ["primary", "wrist"], "history": 2, "proprio": True},
            {"act_chunk": (dict.fromkeys(["primary", "wrist", "primary@-1", "wrist@-1"], "picture"), "numbers")},
        ),
    ],
)
def test_a_saved_model_says_how_to_ask_it(inputs: dict[str, Any], asked: dict[str, tuple[Any, ...]]) -> None:
    calls: dict[str, tuple[Any, ...]] = {}

    class Asked:
        def act(self, image: str, words: str) -> None:
            calls["act"] = (image, words)

        def act_chunk(self, observations: list[Observation]) -> list[None]:
            calls["act_chunk"] = (dict(observations[0].images), observations[0].proprio)
            return [None]

    code = "\n".join(usage(inputs)).replace('Policy.from_pretrained("path/to/this/folder")', "Asked()")
    names = dict.fromkeys(["image", "wrist_image", "primary_1_image", "wrist_1_image"], "picture")
    exec(code, {**names, "state": "numbers", "Asked": Asked})
    assert calls == asked
