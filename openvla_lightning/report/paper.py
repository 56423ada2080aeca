"""What the OpenVLA paper reports, beside what this repository runs: every ablation and its one override."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from openvla_lightning.report.tables import Rows

LIBERO = "OpenVLA in the paper (Table 12: LoRA r=32, 3 x 500 rollouts)"

SUCCESS: Mapping[str, Mapping[str, str]] = {
    "libero_spatial": {LIBERO: "84.7 %"},
    "libero_object": {LIBERO: "88.4 %"},
    "libero_goal": {LIBERO: "79.2 %"},
    "libero_10": {LIBERO: "53.7 %"},
}
"""Task set -> row -> success rate. A policy evaluated on another selection of tasks has another task set."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """One row of the table in docs/ablations.md.

    Attributes:
        where: in the paper (arXiv 2406.09246); `ours` for what this repository adds.
        varies: what, and to what.
        script: which runs it.
        base: the recipe it departs from, as overrides.
        override: the one that departs.
        paper: its numbers, with those of the recipe it departs from.
        twin: overrides that run the same code on the tiny model; None: `override` itself.
    """

    where: str
    varies: str
    script: Literal["train", "finetune", "evaluate"]
    base: tuple[str, ...]
    override: str
    paper: str
    twin: tuple[str, ...] | None = None


OXE, BRIDGE, LORA = ("+experiment=oxe_full",), ("+experiment=bridge",), ("+experiment=libero_spatial_lora",)
SPATIAL = ("env=libero_spatial",)
BOTH_TOWERS = "model/vision_backbone=tiny_fused"

ABLATIONS = (
    Ablation("3.4", "VLM: LLaVA 1.5", "train", BRIDGE, "model=llava_7b", "about 10 points below Prismatic",
             ("processor.prompt=vicuna",)),
    Ablation("3.4", "VLM: in the manner of IDEFICS-1", "train", BRIDGE, "model=idefics_7b",
             "35 points below LLaVA on five language tasks", ("model/projector=perceiver",)),
    Ablation("3.4", "image size 384", "train", OXE, "model/vision_backbone=dinosiglip_384",
             "no difference from 224, three times slower", ("model.vision_backbone.image_size=128",)),
    Ablation("3.4, Table 10", "vision encoders frozen", "train", BRIDGE, "strategy=frozen_vision", "46.7 against 80.0"),
    Ablation("3.4", "learning rate 2e-6", "train", OXE, "optim.lr=2e-6", "fixed 2e-5 best"),
    Ablation("3.4", "learning rate 2e-4", "train", OXE, "optim.lr=2e-4", "fixed 2e-5 best"),
    Ablation("3.4", "warm-up", "train", OXE, "optim.warmup_ratio=0.03", "no benefit"),
    Ablation("3.4", "epochs", "train", OXE, "trainer.max_epochs=2",
             "27; success rises until token accuracy passes 95 %", ("trainer.max_epochs=1",)),
    Ablation("3.3", "DROID kept to the end", "train", OXE, "data/curriculum=none", "its token accuracy stayed low"),
    Ablation("3.3", "DROID left out", "train", OXE, "data/mix=oxe_magic_soup_plus_minus",
             "its token accuracy stayed low"),
    Ablation("App. C", "no-op filter off", "train", BRIDGE, "data.noop_filter=none", "unfiltered policies freeze"),
    Ablation("App. C", "first transitions dropped", "train", BRIDGE, "data.noop_filter=first_step",
             "enough against freezing"),
    Ablation("Table 9", "all of OXE", "train", (), "+experiment=oxe_full", "76.3 ± 4.8"),
    Ablation("Table 9", "Bridge alone", "train", (), "+experiment=bridge", "45.6 ± 5.6"),
    Ablation("Table 9", "Bridge, SigLIP alone", "train", (), "+experiment=bridge_siglip", "40.6 ± 5.5"),
    Ablation("ours", "one encoder", "train", OXE, "model/vision_backbone=siglip_224", "-",
             ("model/vision_backbone=tiny",)),
    Ablation("ours", "encoders one after the other", "train", OXE, "model.vision_backbone.fusion=sequence", "-",
             (BOTH_TOWERS, "model.vision_backbone.fusion=sequence")),
    Ablation("ours", "encoders channel by channel", "train", OXE, "model.vision_backbone.fusion=channel", "-",
             (BOTH_TOWERS,)),
    Ablation("ours", "projector of one layer", "train", OXE, "model/projector=linear", "-"),
    Ablation("ours", "bounds: extremes for percentiles", "train", OXE, "data.normalisation=minmax", "-"),
    Ablation("ours", "128 bins", "train", OXE, "action_head.num_bins=128", "-"),
    Ablation("Table 1", "all weights", "finetune", LORA, "strategy=full", "69.7 ± 7.2; 163.3 GB on 2 GPUs"),
    Ablation("Table 1", "last layer", "finetune", LORA, "strategy=last_layer", "30.3 ± 6.1; 51.4 GB"),
    Ablation("Table 1", "vision frozen", "finetune", LORA, "strategy=frozen_vision", "47.0 ± 6.9; 156.2 GB on 2 GPUs"),
    Ablation("Table 1", "sandwich", "finetune", LORA, "strategy=sandwich", "62.1 ± 7.9; 64.0 GB"),
    Ablation("Table 1", "LoRA, rank 32", "finetune", LORA, "rank=32", "68.2 ± 7.5; 59.7 GB"),
    Ablation("Table 1", "LoRA, rank 64", "finetune", LORA, "rank=64", "68.2 ± 7.8; 60.5 GB"),
    Ablation("Fig. 5, Table 7", "no robot pretraining", "finetune", LORA, "model.init_from=prism-dinosiglip-224px+7b",
             "43.4 against 67.2 (Franka-Tabletop), 21.7 against 58.3 (Franka-DROID)", ("model.init_from=null",)),
    Ablation("Table 12", "LIBERO-Spatial", "finetune", LORA, "data/mix=libero_spatial_no_noops", "84.7"),
    Ablation("Table 12", "LIBERO-Object", "finetune", LORA, "data/mix=libero_object_no_noops", "88.4"),
    Ablation("Table 12", "LIBERO-Goal", "finetune", LORA, "data/mix=libero_goal_no_noops", "79.2"),
    Ablation("Table 12", "LIBERO-Long", "finetune", LORA, "data/mix=libero_10_no_noops", "53.7"),
    Ablation("Table 2", "inference in 8 bits", "evaluate", SPATIAL, "quantisation=int8",
             "58.1 ± 5.1 against 71.3 ± 4.8"),
    Ablation("Table 2", "inference in 4 bits", "evaluate", SPATIAL, "quantisation=int4",
             "71.9 ± 4.7 against 71.3 ± 4.8"),
    Ablation("Tables 2, 11", "the world does not wait", "evaluate", SPATIAL, "eval.control=realtime",
             "8 bits 58.1 against 74.4 ± 4.9 blocking", ("eval.control=realtime", "eval.latency=0.1")),
)  # fmt: skip
"""Every ablation of the paper, and some of our own."""


def ablation_rows(ablations: Iterable[Ablation] = ABLATIONS) -> Rows:
    """The table of docs/ablations.md."""
    rows = [["where", "what varies", "recipe", "override", "the paper"]]
    for row in ablations:
        base = " ".join([f"{row.script}.py", *row.base])
        rows.append([row.where, row.varies, f"`{base}`", f"`{row.override}`", row.paper])
    return rows


def reported(overrides: Iterable[str]) -> str:
    """What the paper reports for a fine-tuning run made by these overrides (Table 1); `-` where it does not."""
    chosen = set(overrides)
    if "strategy=lora" in chosen and not any(text.startswith("rank=") for text in chosen):
        chosen.add("rank=32")
    chosen |= {"rank=64"} if "strategy=lora_64" in chosen else set()
    found = [row.paper.split(";")[0] for row in ABLATIONS if row.where == "Table 1" and row.override in chosen]
    return found[0] if found else "-"
