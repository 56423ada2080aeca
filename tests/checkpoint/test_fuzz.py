"""Two hundred ways to spoil a checkpoint: each is refused with a clear error, none runs code or returns a model."""

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_sets import one
from safetensors.torch import load_file, save_file

from openvla_lightning import VLA
from openvla_lightning.model.checkpoint import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path, random.Random], None]


def edit_config(change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> Spoil:
    def spoil(folder: Path, rng: random.Random) -> None:
        config = json.loads((folder / name).read_text())
        change(config)
        (folder / name).write_text(json.dumps(config))

    return spoil


def edit_weights(change: Callable[[dict[str, torch.Tensor], str], Any], only: str = "") -> Spoil:
    """Change one tensor, chosen among those with a matrix shape whose name holds `only`."""

    def spoil(folder: Path, rng: random.Random) -> None:
        file = rng.choice(sorted(folder.glob("*.safetensors")))
        tensors = load_file(file)
        names = [k for k, v in tensors.items() if v.ndim == 2 and len(set(v.shape)) == 2 and only in k]
        change(tensors, rng.choice(sorted(names) or sorted(tensors)))
        save_file(tensors, file)

    return spoil


def truncate(folder: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def overwrite_header(folder: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[rng.randrange(0, 8)] ^= 0xFF
    file.write_bytes(data)


def truncate_json(folder: Path, rng: random.Random) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: rng.randrange(len(text) - 2)])


def remove(name: str) -> Spoil:
    return lambda folder, rng: (folder / name).unlink()


def remove_shard(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(folder.glob("*.safetensors"))).unlink()


class Trap:
    """Unpickling this would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def hostile(folder: Path, rng: random.Random) -> None:
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    trap = {"projector.fc1.weight": Trap(folder.parent / "mark")}
    if rng.random() < 0.5:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, folder / "pytorch_model.bin")


def hostile_run(folder: Path, rng: random.Random) -> None:
    (folder / "checkpoints").mkdir()
    torch.save({"model": Trap(folder.parent / "mark")}, folder / "checkpoints" / "step-1.pt")


def hostile_archive(folder: Path, rng: random.Random) -> None:
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(folder.parent / "mark")))
        archive.writestr("archive/version", "3")


def lie_in_index(change: Callable[[dict[str, str], str, random.Random], Any]) -> Spoil:
    def spoil(folder: Path, rng: random.Random) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"], rng.choice(sorted(index["weight_map"])), rng)
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def text(name: str, value: Any) -> Spoil:
    return edit_config(lambda config: config["text_config"].update({name: value}))


def top(name: str, value: Any) -> Spoil:
    return edit_config(lambda config: config.update({name: value}))


def drop(name: str) -> Spoil:
    return edit_config(lambda config: config.pop(name))


def stats(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    return edit_config(lambda values: change(values["toy"]["action"]), "dataset_statistics.json")


WEIGHT_SPOILS: dict[str, Spoil] = {
    "truncated": truncate,
    "header": overwrite_header,
    "missing_file": remove_shard,
    "missing_key": edit_weights(lambda t, k: t.pop(k)),
    "surplus_key": edit_weights(lambda t, k: t.update({f"{k}.more": t[k].clone()})),
    "renamed_key": edit_weights(lambda t, k: t.update({f"model.{k}": t.pop(k)})),
    "swapped_shape": edit_weights(lambda t, k: t.update({k: t[k].T.contiguous()})),
    "row_short": edit_weights(lambda t, k: t.update({k: t[k][:-1].clone()})),
    "flattened": edit_weights(lambda t, k: t.update({k: t[k].flatten()})),
    "double": edit_weights(lambda t, k: t.update({k: t[k].double()})),
    "integer": edit_weights(lambda t, k: t.update({k: t[k].to(torch.int8)})),
    "nan": edit_weights(lambda t, k: t[k].view(-1)[:1].fill_(float("nan"))),
    "infinite": edit_weights(lambda t, k: t[k].view(-1)[:1].fill_(float("inf"))),
}
CONFIG_SPOILS: dict[str, Spoil] = {
    "json": truncate_json,
    "no_config": remove("config.json"),
    "list": lambda folder, rng: (folder / "config.json").write_text("[1, 2]") and None,
    "layers": text("num_hidden_layers", 3),
    "billions_of_layers": text("num_hidden_layers", 10**9),
    "no_layers": text("num_hidden_layers", 0),
    "width": text("hidden_size", 64),
    "negative_width": text("hidden_size", -32),
    "width_of_letters": text("hidden_size", "wide"),
    "feed_forward": text("intermediate_size", 49),
    "heads": text("num_attention_heads", 3),
    "key_value_heads": text("num_key_value_heads", 2),
    "vocabulary": text("vocab_size", 900),
    "vocabulary_null": text("vocab_size", None),
    "family": text("model_type", "gpt_neox"),
    "unknown_family": text("model_type", "evil"),
    "tied": text("tie_word_embeddings", True),
    "architectures": top("architectures", ["LlamaForCausalLM"]),
    "no_text_config": drop("text_config"),
    "no_towers": top("timm_model_ids", []),
    "swapped_towers": edit_config(lambda c: c["timm_model_ids"].reverse()),
    "other_tower": edit_config(lambda c: c["timm_model_ids"].__setitem__(0, "vit_base_patch16_224")),
    "unknown_tower": edit_config(lambda c: c["timm_model_ids"].__setitem__(0, "os.system")),
    "hub_tower": edit_config(lambda c: c["timm_model_ids"].__setitem__(0, "hf-hub:evil/model")),
    "one_tower": edit_config(lambda c: c["timm_model_ids"].pop()),
    "tower_width": edit_config(lambda c: c["timm_model_kwargs"][0].update(embed_dim=28)),
    "tower_depth": edit_config(lambda c: c["timm_model_kwargs"][1].update(depth=5)),
    "tower_heads": edit_config(lambda c: c["timm_model_kwargs"][1].update(num_heads=5)),
    "tower_argument": edit_config(lambda c: c["timm_model_kwargs"][1].update(evil=1)),
    "tower_file": edit_config(lambda c: c["timm_model_kwargs"][1].update(checkpoint_path="/etc/passwd")),
    "tower_list": top("timm_model_kwargs", [1, 2]),
    "image_size": top("image_sizes", [70, 70]),
    "image_sizes_differ": top("image_sizes", [56, 70]),
    "image_size_huge": top("image_sizes", [10**7, 10**7]),
    "image_size_zero": top("image_sizes", [0, 0]),
    "not_fused": top("use_fused_vision_backbone", False),
    "projector": top("arch_specifier", "no-align+gelu-mlp"),
    "model_type": top("model_type", "llama"),
    "pad": top("pad_token_id", 99_999),
    "pads_differ": text("pad_token_id", 5),
    "padding": top("pad_to_multiple_of", 900),
    "bins": top("n_action_bins", 4096),
    "vision_id": top("vision_backbone_id", "siglip-vit-so400m"),
    "llm_id": top("llm_backbone_id", "phi-2-3b"),
    "stats_bound": stats(lambda a: a.pop("q99")),
    "stats_width": stats(lambda a: a["q01"].pop()),
    "stats_order": stats(lambda a: a.update(q01=a["q99"], q99=a["q01"])),
    "stats_nan": stats(lambda a: a["q01"].__setitem__(0, float("nan"))),
    "stats_mask": stats(lambda a: a.update(mask=["yes"] * 7)),
    "stats_text": stats(lambda a: a.update(q01="low")),
    "pixel_mean": edit_config(lambda c: c["means"].pop(), "preprocessor_config.json"),
    "pixel_std": edit_config(lambda c: c["stds"][0].__setitem__(0, 0.0), "preprocessor_config.json"),
    "pixel_size": edit_config(lambda c: c.update(input_sizes=[[3, 224, 224]] * 2), "preprocessor_config.json"),
    "pixel_mean_twice": edit_config(
        lambda c: c["tvf_normalize_params"][0].update(mean=[0.1, 0.2, 0.3]), "preprocessor_config.json"
    ),
    "pixel_strategy": edit_config(lambda c: c.update(image_resize_strategy="letterbox"), "preprocessor_config.json"),
    "end_token": edit_config(lambda c: c.update(eos_token_id=7), "generation_config.json"),
    "pad_token": edit_config(lambda c: c.update(pad_token_id=7), "generation_config.json"),
    "hostile": hostile,
    "hostile_run": hostile_run,
    "hostile_archive": hostile_archive,
}
INDEX_SPOILS: dict[str, Spoil] = {
    "index_loses_key": lie_in_index(lambda m, k, r: m.pop(k)),
    "index_invents_key": lie_in_index(lambda m, k, r: m.update({f"{k}.x": m[k]})),
    "index_wrong_shard": lie_in_index(lambda m, k, r: m.update({k: next(v for v in m.values() if v != m[k])})),
    "index_escapes": lie_in_index(lambda m, k, r: m.update({k: "../model.safetensors"})),
    "index_absolute": lie_in_index(lambda m, k, r: m.update({k: "/etc/passwd"})),
    "index_pickle": lie_in_index(lambda m, k, r: m.update({k: "pytorch_model.bin"})),
    "index_empty": lie_in_index(lambda m, k, r: m.clear()),
    "index_numbers": lie_in_index(lambda m, k, r: m.update({k: 3})),
}
CASES = (
    [(name, spoil, seed, False) for seed in range(5) for name, spoil in WEIGHT_SPOILS.items()]
    + [(name, spoil, 10 + seed, True) for seed in range(5) for name, spoil in WEIGHT_SPOILS.items()]
    + [(name, spoil, 20, False) for name, spoil in CONFIG_SPOILS.items()]
    + [(name, spoil, 30 + seed, True) for seed in range(4) for name, spoil in INDEX_SPOILS.items()]
)


@pytest.fixture(scope="module")
def sharded(vla: VLA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    vla.save_pretrained(path, max_shard_size=150_000)
    return path


def test_there_are_two_hundred_cases() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(("name", "spoil", "seed", "in_shards"), CASES)
def test_a_spoilt_checkpoint_is_refused(
    folder: Path, sharded: Path, tmp_path: Path, name: str, spoil: Spoil, seed: int, in_shards: bool
) -> None:
    target = tmp_path / "checkpoint"
    shutil.copytree(sharded if in_shards else folder, target)
    spoil(target, random.Random(f"{name} {seed}"))
    with pytest.raises(CheckpointError) as error:
        VLA.from_pretrained(target, guard=False)
    assert len(str(error.value).splitlines()) >= 2
    assert all(problem.strip() for problem in error.value.problems)
    assert not (tmp_path / "mark").exists(), "code from the checkpoint was run"


RELEASED_LIES = {
    "padding": top("pad_to_multiple_of", 32),
    "family": text("model_type", "mistral"),
    "activation": text("hidden_act", "gelu"),
    "tower_activation": top("timm_override_act_layers", ["quick_gelu", None]),
    "pixel_mean": edit_config(
        lambda c: (c["means"][0].__setitem__(0, 0.5), c["tvf_normalize_params"][0]["mean"].__setitem__(0, 0.5)),
        "preprocessor_config.json",
    ),
    "heads": text("num_attention_heads", 8),
}


@pytest.mark.parametrize("name", RELEASED_LIES)
def test_lies_that_no_shape_shows_about_a_released_model(each_golden: Path, tmp_path: Path, name: str) -> None:
    """What a known model must be is checked although the weights would fit."""
    for file in one(each_golden / "model", "tiny_*").glob("*.[js]*"):
        shutil.copyfile(file, tmp_path / file.name)
    VLA.from_pretrained(tmp_path, guard=False)
    RELEASED_LIES[name](tmp_path, random.Random(0))
    with pytest.raises(CheckpointError):
        VLA.from_pretrained(tmp_path, guard=False)
