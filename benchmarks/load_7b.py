"""Load a full-size OpenVLA in the released layout and act with it, on the CPU: seconds and peak memory.

    python benchmarks/load_7b.py /big/disk/skeleton          # writes 15 GB of random weights, then removes them
    python benchmarks/load_7b.py /big/disk/skeleton --keep

It needs no download: the folder has the released names, shapes and files, with random weights and an artificial
tokenizer.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openvla_lightning import VLA, Policy
from openvla_lightning.checkpoint.architecture import released_config
from openvla_lightning.checkpoint.preprocessor import FILE, preprocessor_config
from openvla_lightning.model.vision_backbone import pixel_statistics

CONF = Path(__file__).parents[1] / "conf" / "model"
PARTS = {"vision_backbone": "dinosiglip_224", "llm": "llama2_7b"}
NOT_CONFIG = ("_target_", "_partial_", "pretrained")
SHARDS = 3


def describe() -> dict[str, Any]:
    """openvla-7b as `VLA.config`."""
    config: dict[str, Any] = {"projector": {"kind": "fused_mlp"}}
    for group, name in PARTS.items():
        node = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
        assert isinstance(node, dict)
        config[group] = {str(k): v for k, v in node.items() if k not in NOT_CONFIG}
    return config


def write_skeleton(folder: Path) -> None:
    """Random weights in three shards, one in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        vla = VLA.from_config(describe())
    shapes = {key: value.shape for key, value in vla.state_dict().items()}
    total = sum(shape.numel() for shape in shapes.values()) * 2
    shards: list[dict[str, torch.Size]] = [{} for _ in range(SHARDS)]
    filled = 0
    for key, shape in shapes.items():
        shards[min(SHARDS - 1, filled * SHARDS // total)][key] = shape
        filled += shape.numel() * 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**24, generator=generator).to(torch.bfloat16)
    names = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: fill(shape, noise) for key, shape in shard.items()}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    means, stds = pixel_statistics(vla.vision_backbone.towers)
    processor = {"image_size": 224, "means": means, "stds": stds, "resize_strategy": "resize-naive"}
    stats = {"bridge_orig": {"action": {"q01": [-0.03] * 7, "q99": [0.03] * 7, "mask": [True] * 6 + [False]}}}
    config = released_config(vla.config, {}, torch.bfloat16) | {"norm_stats": stats}
    files = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        "config.json": config,
        FILE: preprocessor_config(processor, {}),
        "dataset_statistics.json": stats,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    write_tokenizer(folder)


def fill(shape: torch.Size, noise: torch.Tensor) -> torch.Tensor:
    """Norms near one, and all other weights small enough that 32 layers stay finite."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = shape.numel()
    repeated = noise.repeat(-(-count // len(noise)))[:count] if count > len(noise) else noise[:count].clone()
    return (repeated * (1 / shape[1:].numel()) ** 0.5).view(shape)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with 32,000 words and <PAD>, with Llama's special ids and lone space."""
    words = {0: "<unk>", 1: "<s>", 2: "</s>", 29871: "▁"}
    vocabulary = {words.get(index, f"▁word{index}"): index for index in range(32000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)


def measure(folder: Path) -> None:
    """Load, act twice, print times and memory."""
    started = time.monotonic()
    vla = VLA.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.monotonic() - started
    print(f"loaded {sum(p.numel() for p in vla.parameters()):,} parameters in {loaded:.0f} s")
    print(f"peak resident memory while loading {peak_gigabytes():.1f} GB, file cache included")
    print(f"memory held afterwards {anonymous_gigabytes():.1f} GB")
    del vla
    policy = Policy.from_pretrained(folder, device="cpu", dtype="bfloat16")
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    for call in ("first", "second"):
        started = time.monotonic()
        action = policy.act(image, "put the spoon on the towel")
        print(f"{call} policy.act {time.monotonic() - started:.1f} s: {np.round(action, 4).tolist()}")
    print(f"peak resident memory in all {peak_gigabytes():.1f} GB")


def peak_gigabytes() -> float:
    """Largest resident set so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def anonymous_gigabytes() -> float:
    """Present memory that is not backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def main() -> None:
    """Write the skeleton in this process, measure in a fresh one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where 15 GB fit")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_only:
        return measure(arguments.folder)
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        sys.exit(f"{arguments.folder} is not empty: give a new folder")
    if shutil.disk_usage(arguments.folder.absolute().parent).free < 17e9:
        sys.exit(f"{arguments.folder.absolute().parent} has less than 17 GB free")
    try:
        started = time.monotonic()
        write_skeleton(arguments.folder)
        print(f"wrote the skeleton in {time.monotonic() - started:.0f} s", flush=True)
        subprocess.run([sys.executable, __file__, str(arguments.folder), "--measure-only"], check=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder, ignore_errors=True)
    return None


if __name__ == "__main__":
    main()
