"""Make one small checkpoint of each kind, as training and export write them.

    PYTHONPATH=.:tests python tests/golden/make_checkpoints.py FOLDER

Those in `checkpoints/` were made with the code of commit f4f80e0, from whose root this was run. They stay as they are:
what reads checkpoints has to go on reading these. A kind that is new is added beside them, by the code that first
writes it.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warm_scripts
from PIL import Image

from openvla_lightning import VLA, Policy, Processor

SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
TOWERS = {
    "dino": {"id": "vit_large_patch14_reg4_dinov2.lvd142m", **SIZES},
    "siglip": {"id": "vit_so400m_patch14_siglip_224.webli", **SIZES},
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 768,
    "hidden_size": 4,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIG: dict[str, Any] = {
    "vision_backbone": {"towers": TOWERS, "image_size": 8},
    "projector": {"kind": "fused_mlp"},
    "llm": {"name": "tiny", "vocab_size": 768, "architecture": LLAMA},
}
MODEL = [
    *("model/vision_backbone=tiny_fused", "model.vision_backbone.image_size=8"),
    *("~model.vision_backbone.towers.stem", "~model.vision_backbone.towers.plain"),
    *(f"+model.vision_backbone.towers.{name}={json.dumps(tower)}".replace('"', "") for name, tower in TOWERS.items()),
    *(f"model.llm.architecture.{name}={LLAMA[name]}" for name in ("hidden_size", "intermediate_size")),
    *(f"model.llm.architecture.{name}={LLAMA[name]}" for name in ("num_hidden_layers", "num_attention_heads")),
]
SHORT = [
    *("data.global_batch_size=2", "optim.lr=1e-3", "trainer.max_steps=2", "save_every=2"),
    *("trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "~callbacks.learning_curve"),
]


SEEDS = {512: 58, 640: 116, 31744: 1}
"""First action id -> a seed of weights with wide gaps between the likeliest ids and the next."""
MIX = "data/mix=bridge_rt_1"


def beginning_of(first_action: int, config: dict[str, Any], seed: int | None = None) -> VLA:
    """Weights so far apart that the likeliest id is an action, depends on the image, and is likeliest by far."""
    torch.manual_seed(SEEDS[first_action] if seed is None else seed)
    vla = VLA.from_config(config)
    with torch.no_grad():
        for parameter in vla.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        vla.llm.lm_head.weight[:first_action] *= 0.1
        vla.llm.lm_head.weight[first_action:] *= 2
    return vla


def run(script: str, root: Path, name: str, *overrides: str) -> Path:
    """Run a script of this repository; return the last checkpoint of the run."""
    where = [f"run_name={name}", f"paths.log_dir={root}", f"paths.data_dir={root}/data"]
    print(name, flush=True)
    warm_scripts.finish(script, root / f"{name}.log", *overrides, "+debug=tiny", *MODEL, *SHORT, *where)
    (path,) = (root / name).glob("*/checkpoints/step_000002.ckpt")
    return path


def export(source: Path, folder: Path) -> None:
    """Write the released layout."""
    module = [sys.executable, "-m", "openvla_lightning.model.checkpoint", "export"]
    subprocess.run([*module, str(source), str(folder)], check=True)


def copy_without_moments(source: Path, target: Path) -> None:
    """Leave out the optimiser's moments, two thirds of a file, which only resuming reads."""
    content = torch.load(source, weights_only=True)
    torch.save({**content, "optimizer_states": []}, target)


def record(folder: Path, root: Path) -> None:
    """What each checkpoint answers: ids, and by how much they are likelier than the next ones; actions."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(2)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"picture_{number}.png")
    requests = [(number, words) for words in ("pick up the cube", "push the red drawer") for number in range(2)]
    asked = [pictures[number] for number, _ in requests], [words for _, words in requests]
    answers: dict[str, Any] = {}
    packed = [root / "sharded.ckpt", root / "prismatic"]
    for path in (*sorted(folder.glob("*.ckpt")), *sorted(folder.glob("*released")), *packed):
        base = folder / "released" if path.name.startswith("lora") else None
        tokenizer = {"tokenizer": "tiny"} if path.name == "prismatic" else {}
        vla, processor = VLA.from_pretrained(path, base=base), Processor.from_pretrained(path, **tokenizer)
        inputs = processor(*asked)
        ids = vla.generate(**inputs, max_new_tokens=7)
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1), "attention_mask": None}
        if not inputs["attention_mask"].all():
            sys.exit("instructions of one length are needed here")
        with torch.no_grad():
            best = vla(**longer).next_token_logits[:, -7:].topk(2, -1)
        answers[path.name] = {
            "base": base and base.name,
            **tokenizer,
            "ids": ids.tolist(),
            "smallest_gap": round(float((best.values[..., 0] - best.values[..., 1]).min()), 4),
        }
        if not torch.equal(best.indices[..., 0], ids):
            sys.exit(f"{path}: generation and a plain forward pass disagree")
        if vla.norm_stats:
            key = "toy" if path.name == "prismatic" else "bridge_orig"
            options = {"unnorm_key": key, "device": "cpu", "dtype": "float32", "base": base, **tokenizer}
            answers[path.name] |= {
                "unnorm_key": key,
                "actions": Policy.from_pretrained(path, **options).act(*asked).tolist(),
            }
        print(path.name, answers[path.name]["smallest_gap"], ids.tolist(), flush=True)
    # The exports of that time said 256 bins whatever the head had: what the checkpoint itself answers is right.
    answers["bins_128_released"]["actions"] = answers["bins_128.ckpt"]["actions"]
    resumed = {path.name: go_on(path, folder, root) for path in (folder / "full.ckpt", folder / "lora.ckpt", packed[0])}
    content = {"requests": [{"picture": number, "instruction": words} for number, words in requests]}
    (folder / "answers.json").write_text(
        json.dumps({**content, "answers": answers, "resumed": resumed}, indent=1) + "\n"
    )


def go_on(path: Path, folder: Path, root: Path) -> dict[str, Any]:
    """Two more steps: what to run, where CHECKPOINT and BASE stand for paths, and its losses."""
    script = "finetune.py" if path.stem == "lora" else "train.py"
    told = ["+debug=tiny", *MODEL, *SHORT, MIX, "trainer.max_steps=4", "ckpt_path=CHECKPOINT"]
    if path.stem == "lora":
        told += ["strategy=lora", "rank=2", "optim.lr=3e-2", "model.init_from=BASE"]
    if path.stem == "sharded":
        told += ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.strategy.param_dtype=float32"]
    runs = root / f"{path.stem}_resumed"
    runs.mkdir()
    where = [f"paths.log_dir={runs}", f"paths.data_dir={runs}/data"]
    overrides = [text.replace("CHECKPOINT", str(path)).replace("BASE", str(folder / "released")) for text in told]
    warm_scripts.finish(script, runs / "log", *overrides, *where)
    (metrics,) = runs.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    return {"script": script, "overrides": told, "losses": losses[-2:]}


def prismatic(folder: Path) -> None:
    """A run of the released training code: Llama's vocabulary, `text_config` for sizes that real runs have by name.

    Rows of ids that the tiny tokenizer does not have are nought, so that the archive is small.
    """
    llama = {**LLAMA, "vocab_size": 32064, "pad_token_id": 32000, "rms_norm_eps": 1e-6, "num_key_value_heads": 2}
    llm = {"name": "meta-llama/Llama-2-7b-hf", "vocab_size": 32000, "architecture": llama}
    vla = beginning_of(31744, {**CONFIG, "llm": llm})
    with torch.no_grad():
        for table in (vla.llm.lm_head, vla.llm.model.embed_tokens):
            table.weight[768:31744] = 0
            table.weight[32000:] = 0
    parts: dict[str, dict[str, torch.Tensor]] = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    layers = {"fc1": "0", "fc2": "2", "fc3": "4"}
    towers = {"featurizer": "dino_featurizer", "fused_featurizer": "siglip_featurizer"}
    for key, value in vla.state_dict().items():
        part, first, rest = key.split(".", 2)
        if part == "language_model":
            parts["llm_backbone"][f"llm.{first}.{rest}"] = value
        elif part == "projector":
            parts["projector"][f"projector.{layers[first]}.{rest}"] = value
        else:
            parts["vision_backbone"][f"{towers[first]}.{rest.replace('scale_factor', 'gamma')}"] = value
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"model": parts}, folder / "checkpoints" / "step-000010-epoch-00-loss=1.0.pt")
    model = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "image_sizes": [8, 8],
        "timm_model_kwargs": [SIZES, SIZES],
        "text_config": llama,
    }
    (folder / "config.json").write_text(json.dumps({"model": model}))
    action = {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]}
    stats = {"toy": {"action": action, "num_trajectories": 3, "num_transitions": 70}}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))


def sharded(root: Path, start: Path) -> Path:
    """Two processes of FSDP, as torchrun starts them."""
    folder = root / "sharded" / "run"
    overrides = [
        *(
            "+debug=tiny",
            *MODEL,
            *SHORT,
            MIX,
            f"model.init_from={start}",
            "trainer=fsdp",
            "trainer.accelerator=cpu",
            "trainer.devices=2",
        ),
        *("trainer.strategy.param_dtype=float32", "run_name=sharded", f"paths.log_dir={root}"),
        *(f"paths.output_dir={folder}", f"paths.data_dir={root}/data"),
    ]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    world["TORCHELASTIC_RUN_ID"] = "make"
    command = [sys.executable, "train.py", *overrides]
    processes = [subprocess.Popen(command, env={**os.environ, **world, **rank}) for rank in ranks]
    if any(process.wait() for process in processes):
        sys.exit("the sharded training failed")
    return folder / "checkpoints" / "step_000002.ckpt"


def main(folder: Path) -> None:
    """Make all of them, below `folder`; what is made on the way goes to `folder`/runs."""
    root = folder.absolute() / "runs"
    root.mkdir(parents=True)
    beginning = folder.absolute() / "beginning"
    beginning_of(512, CONFIG).save_pretrained(beginning)
    beginning_of(640, CONFIG).save_pretrained(folder / "beginning_128")
    tuned = [f"model.init_from={beginning}", MIX]
    full = run("train.py", root, "full", *tuned)
    shutil.copy(full, folder / "full.ckpt")
    export(full, folder / "released")
    base = [f"model.init_from={folder.absolute()}/released", MIX, "rank=2", "optim.lr=3e-2"]
    shutil.copy(run("finetune.py", root, "lora", "strategy=lora", *base), folder / "lora.ckpt")
    on_8_bits = ["strategy=lora", "quantisation=int8", *base]
    copy_without_moments(run("finetune.py", root, "lora_on_8_bits", *on_8_bits), folder / "lora_on_8_bits.ckpt")
    of_128 = [f"model.init_from={beginning}_128", MIX, "action_head.num_bins=128"]
    bins = run("train.py", root, "bins_128", *of_128)
    copy_without_moments(bins, folder / "bins_128.ckpt")
    export(bins, folder / "bins_128_released")
    stage = run("train.py", root, "conversations", "+experiment=vlm_pretrain", f"model.init_from={beginning}")
    copy_without_moments(stage, folder / "conversations.ckpt")
    shutil.copytree(sharded(root, beginning), root / "sharded.ckpt")
    prismatic(root / "prismatic")
    for name in ("sharded.ckpt", "prismatic"):
        with tarfile.open(folder / f"{name.removesuffix('.ckpt')}.tar.gz", "w:gz") as archive:
            archive.add(root / name, name)
    record(folder, root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
