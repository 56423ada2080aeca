"""Cut the small set `released.tar.xz` out of the golden numbers of the released code.

    OPENVLA_GOLDEN=/path/to/golden python tests/golden/make_released.py

What is in it and what is left out is told in README.md. Nothing is computed here but the choice of what to keep.
"""

import io
import json
import lzma
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

TARGET = Path(__file__).with_name("released.tar.xz")
FROM_DISK = ["bridge_orig", "droid", "fractal20220817_data", "kuka", "language_table", "libero_spatial_no_noops"]
"""Datasets of which the files on disk are kept, too."""
DATASETS = [
    *FROM_DISK,
    *("berkeley_gnm_recon", "cmu_playing_with_food", "dobbe", "imperialcollege_sawyer_wrist_cam"),
    *("roboturk", "roboset", "tdroid_carrot_in_bowl", "toto"),
]
TRAJECTORIES = 3
"""Trajectories kept of each dataset, standardised."""
ROW = 2
"""Sample of the tiny model's batch that is kept."""
OF_ALL_WORDS = ("loss", "logsumexp", "nll", "bf16", "grad", "lora", "train", "text_only", "metrics", "last_prompt")
"""Parts of names of what depends on every row of the vocabulary."""
PLACES = 16
"""Every so many places among the image's patches, hidden states and logits are kept; of the text all."""


class Archive:
    """Files by name, in the layout of the golden folder."""

    def __init__(self, golden: Path) -> None:
        self.golden, self.files = golden, {}  # type: Path, dict[str, bytes]

    def json(self, name: str) -> Any:
        return json.loads((self.golden / name).read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.golden / name))

    def keep(self, name: str, content: Any = None) -> None:
        """Keep a file as it is, or `content` in its place."""
        if content is None:
            content = (self.golden / name).read_bytes() if not name.endswith(".npz") else self.arrays(name)
        if isinstance(content, Mapping) and name.endswith(".npz"):
            buffer = io.BytesIO()
            np.savez(buffer, **content)
            content = buffer.getvalue()
        self.files[name] = content if isinstance(content, bytes) else json.dumps(content).encode()

    def write(self, target: Path) -> None:
        """As one file, the same bytes for the same content."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, content in sorted(self.files.items(), key=lambda item: (not item[0].endswith(".json"), item[0])):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
        target.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def only(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: facts[name] for name in names if name in facts}


def keep_model_facts(archive: Archive) -> None:
    """Statistics, bins, names and shapes, counts."""
    archive.keep("model/action_norm_stats.json")
    archive.keep("model/action_tokenizer.npz")
    variants = archive.json("model/openvla7b_hf_keys.json")["variants"]
    for facts in variants.values():
        facts["keys"] = {name: only(entry, "shape") for name, entry in facts["keys"].items()}
    told = ("config", "config_full_text", "n_keys", "param_counts", "keys")
    kept = {name: only(facts, *told) for name, facts in variants.items()}
    archive.keep("model/openvla7b_hf_keys.json", {"variants": kept})
    counts = archive.json("model/lora_and_trainable_counts.json")
    lora = {name: only(facts, "trainable", "base_total") for name, facts in counts["lora"].items()}
    stages = {
        variant: {stage: only(facts, "trainable", "total") for stage, facts in stages.items()}
        for variant, stages in counts["native_stages"].items()
    }
    content = {"versions": counts["versions"], "lora": lora, "native_stages": stages}
    archive.keep("model/lora_and_trainable_counts.json", content)


def keep_tiny_model(archive: Archive, folder: str) -> None:
    """One sample, and of the vocabulary the rows that it meets: the rest of both tables is nought."""
    arrays = archive.arrays(f"{folder}/golden.npz")
    rows, mask = len(arrays["input_ids"]), arrays["fwd/mm_attention_mask"][ROW]
    patches = len(mask) - arrays["input_ids"].shape[1]
    place = np.arange(len(mask))
    compared = mask & ((place % PLACES == 0) | (place > patches))
    kept: dict[str, np.ndarray] = {"compared": compared[None], "vocab_subset": arrays["vocab_subset"]}
    for name, value in arrays.items():
        number = name.rpartition("/")[2] if name.startswith("predict") else name.rpartition("_")[2]
        if any(part in name for part in OF_ALL_WORDS):
            continue
        if number.isdigit() and int(number) < rows:
            if int(number) == ROW:
                kept[name.removesuffix(number) + "0"] = value
        elif name == "fwd/hidden_states":
            kept[name] = np.where(compared[:, None], value[:, ROW : ROW + 1], 0)
        elif name.startswith("fwd/logits"):
            kept[name] = np.where(compared[:, None], value[ROW : ROW + 1], 0)
        elif value.ndim and len(value) == rows:
            kept[name] = value[ROW : ROW + 1]
    archive.keep(f"{folder}/golden.npz", kept)
    said = np.concatenate([value.ravel() for name, value in kept.items() if "ids" in name])
    words = np.unique(np.concatenate([said, kept["vocab_subset"], np.arange(31744, 32064), [29871]]))
    weights = load_file(archive.golden / folder / "model.safetensors")
    structure = archive.json(f"{folder}/vision_structure.json")
    for name, weight in weights.items():
        if name.endswith(("lm_head.weight", "embed_tokens.weight")):
            row = torch.zeros(len(weight), 1, dtype=torch.bool)
            row[torch.from_numpy(words)] = True
            weights[name] = weight.where(row, 0)
        elif name.startswith("vision_backbone."):
            tower, _, rest = name.removeprefix("vision_backbone.").partition(".")
            last = f"blocks.{structure[tower]['returned_block_index'] + 1}."
            if rest.startswith((last, "norm.", "attn_pool.")):  # past the layer that is read
                weights[name] = torch.zeros_like(weight)
    archive.keep(f"{folder}/model.safetensors", save(weights, metadata={"format": "pt"}))
    for name in ("config", "dataset_statistics", "generation_config", "preprocessor_config"):
        archive.keep(f"{folder}/{name}.json")


def keep_data_facts(archive: Archive) -> None:
    """What the released code says of its datasets and mixtures, and numbers of the real Bridge sample."""
    facts = archive.json("data/oxe_datasets.json")
    told = ("image_obs_keys", "state_obs_keys", "action_encoding", "frame_filter", "absolute_action_mask")
    datasets = {name: only(of, *told, "action_normalization_mask") for name, of in facts["datasets"].items()}
    mixtures = {name: only(of, "entries_in_order", "rejected_at_load") for name, of in facts["mixtures"].items()}
    archive.keep("data/oxe_datasets.json", {"datasets": datasets, "mixtures": mixtures})
    archive.keep("data/bridge/mixture_weights_published_sizes.json")
    archive.keep("data/bridge/golden_bridge.json")
    bridge = archive.arrays("data/bridge/golden_bridge.npz")
    parts = ("action_", "EEF_state", "raw/train/action", "raw/train/state", "raw/train/traj_len")
    wanted = {
        name: value
        for name, value in bridge.items()
        if (name.startswith(("bridge_orig/", "octo_no_first", "raw/train/")) and any(part in name for part in parts))
        or name in {f"images/00/{stage}" for stage in ("encoded", "decoded", "resized224")}
    }
    archive.keep("data/bridge/golden_bridge.npz", wanted)


def keep_transforms(archive: Archive, folder: str, of: str) -> None:
    """The functions one by one; some trajectories of some datasets; files of a few of those."""
    archive.keep(f"{folder}/golden_units_{of}.npz")
    manifest = archive.json(f"{folder}/golden_transforms_{of}.manifest.json")
    told = ("statistics", "trajectories")
    content = {name: only(manifest["datasets"][name], *told) for name in DATASETS}
    for name, facts in content.items():
        facts["trajectories"] = [only(of, "split") for of in facts["trajectories"]]
        facts["files"] = name in FROM_DISK
    archive.keep(f"{folder}/golden_transforms_{of}.manifest.json", {"datasets": content})
    arrays = np.load(archive.golden / f"{folder}/golden_transforms_{of}.npz")
    kept = {}
    for name in arrays.files:
        dataset, number, part, _ = name.split("|", 3)
        normalised = part == "norm" and dataset in FROM_DISK
        if normalised or (part != "norm" and dataset in DATASETS and int(number) < TRAJECTORIES):
            kept[name] = arrays[name]
    archive.keep(f"{folder}/golden_transforms_{of}.npz", kept)
    buffer = io.BytesIO()
    with (
        tarfile.open(archive.golden / f"{folder}/synthetic_rlds_{of}.tar.gz") as source,
        tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.USTAR_FORMAT, compresslevel=0) as target,
    ):
        for member in source.getmembers():
            if member.isfile() and set(Path(member.name).parts) & set(FROM_DISK):
                target.addfile(member, source.extractfile(member))
    archive.keep(f"{folder}/synthetic_rlds_{of}.tar.gz", buffer.getvalue())


def main() -> None:
    """Write the archive beside this file."""
    archive = Archive(Path(os.environ["OPENVLA_GOLDEN"]))
    keep_model_facts(archive)
    keep_tiny_model(archive, "model/tiny_a")
    keep_data_facts(archive)
    keep_transforms(archive, "data/transforms", "A")
    archive.write(TARGET)
    for name, content in sorted(archive.files.items()):
        print(f"{len(lzma.compress(content, preset=6)):9,}  {name}")
    print(f"{TARGET.stat().st_size:9,}  {TARGET.name}")


if __name__ == "__main__":
    main()
