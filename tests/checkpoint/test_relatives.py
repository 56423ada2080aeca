"""Relatives of released checkpoints: saved again in another dtype, pickled in parts, adapters alone, not downloaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.load import load_vla
from openvla_lightning.model.vla import VLA
from openvla_lightning.strategy.lora import merge

NORM = "language_model.model.norm.weight"


def saved_again(folder: Path, to: Path, dtype: torch.dtype, top: str, text: str, odd: str | None = None) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["torch_dtype"], config["text_config"]["torch_dtype"] = top, text
    (to / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    if odd:
        tensors[odd] = tensors[odd].float()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("dtype", "top", "text", "odd", "said"),
    [
        (torch.float16, "float16", "bfloat16", None, None),
        (torch.float32, "float32", "bfloat16", None, None),
        (torch.float32, "bfloat16", "bfloat16", None, "config.json says torch_dtype torch.bfloat16, the weights are"),
        (torch.bfloat16, "bfloat16", "bfloat16", NORM, rf"1 are not ({NORM} (torch.float32)): all are cast alike"),
    ],
)
def test_a_checkpoint_saved_again_in_another_dtype_is_cast(
    folder: Path, tmp_path: Path, caplog, dtype: torch.dtype, top: str, text: str, odd: str | None, said: str | None
) -> None:
    caplog.set_level(logging.WARNING)
    again = saved_again(folder, tmp_path / "again", dtype, top, text, odd)
    assert {p.dtype for p in load_vla(again).parameters()} == {dtype}
    assert (said in caplog.text) if said else not caplog.records
    whole = load_vla(folder, dtype=torch.bfloat16).state_dict()
    half = load_vla(again, dtype=torch.bfloat16).state_dict()
    for name in whole:
        torch.testing.assert_close(half[name], whole[name], rtol=1e-2, atol=1e-2)


def test_values_are_still_checked(folder: Path, tmp_path: Path) -> None:
    again = saved_again(folder, tmp_path / "again", torch.float16, "float16", "bfloat16")
    tensors = load_file(again / "model.safetensors")
    tensors[NORM][0] = float("inf")  # as a value too large for 16 bits becomes
    save_file(tensors, again / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{NORM}: holds values that are not finite"):
        load_vla(again)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "dataset_statistics.json"])
def test_a_git_lfs_pointer_is_said_to_be_one(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path / "clone")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7121920\n"
    (tmp_path / "clone" / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*`git lfs pull` in .*clone does"):
        load_vla(tmp_path / "clone")


@pytest.mark.parametrize("place", [("action", "std"), ("action", "max"), ("proprio", "q99")])
def test_statistics_that_hold_no_numbers_are_refused(folder: Path, tmp_path: Path, place: tuple[str, str]) -> None:
    shutil.copytree(folder, tmp_path / "nan")
    path = tmp_path / "nan" / "dataset_statistics.json"
    said = json.loads(path.read_text())
    name = next(iter(said))
    said[name].setdefault(place[0], {}).setdefault(place[1], [0.0] * 7)[0] = float("nan")
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=rf"statistics of '{name}': {'.'.join(place)} must hold finite numbers"):
        describe(tmp_path / "nan").check()


def test_weights_pickled_in_several_files_are_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    mapping = {name: f"pytorch_model-0000{1 + (i >= 60)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(mapping.values()):
        torch.save({name: tensors[name] for name in names if mapping[name] == file}, tmp_path / "bin" / file)
    index = tmp_path / "bin" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    ours, theirs = load_vla(tmp_path / "bin").state_dict(), load_vla(folder).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (tmp_path / "bin" / mapping[names[0]]).unlink()
    with pytest.raises(CheckpointError, match=f"the shard {mapping[names[0]]} is missing"):
        load_vla(tmp_path / "bin")


@pytest.fixture
def adapter(vla: VLA, folder: Path, tmp_path: Path) -> tuple[Path, VLA]:
    """What peft saves of adapters on some layers, and the model they are merged into."""
    torch.manual_seed(0)
    adapted = load_vla(folder)
    targets = [
        n for n, m in adapted.named_modules() if n.endswith(("q_proj", "attn.qkv", "fc1")) and hasattr(m, "weight")
    ]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False), adapted)
    tensors = {f"base_model.model.{k}": v.contiguous() for k, v in get_peft_model_state_dict(adapted).items()}
    to = tmp_path / "openvla-7b+mine+b16+lora-r4"
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors")
    about = {"base_model_name_or_path": str(folder), "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (to / "adapter_config.json").write_text(json.dumps(about | {"target_modules": targets}))
    shutil.copy(folder / "dataset_statistics.json", to)
    merge(adapted)
    return to, adapted


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_folder_is_loaded_onto_its_base(adapter: tuple[Path, VLA], folder: Path, pickled: bool) -> None:
    path, merged = adapter
    if pickled:
        torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
        (path / "adapter_model.safetensors").unlink()
    loaded = load_vla(path)
    expected = merged.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert set(loaded.norm_stats) == set(describe(folder).norm_stats)
    about = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": "./nothing"}))
    with pytest.raises(CheckpointError, match=r"it is an adapter and its base is gone: .*\n.*base="):
        load_vla(path)
    assert load_vla(path, base=folder).state_dict().keys() == expected.keys()


def test_half_an_adapter_is_refused(adapter: tuple[Path, VLA]) -> None:
    path, _ = adapter
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lora_B" not in k}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks lora_B"):
        load_vla(path)
