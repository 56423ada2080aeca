"""Names, shapes and counts of the real models, on the meta device: no weights, a few seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_sets import LARGEST
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from openvla_lightning import VLA
from openvla_lightning.checkpoint.architecture import released_config
from openvla_lightning.model.llm import CausalLM
from openvla_lightning.model.projector import MLP, FusedMLP, Projector
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.strategy import LoRA, TrainOnly

CONF = Path(__file__).parents[2] / "conf" / "model"
ALL = ["vision_backbone", "projector", "llm"]
LAST = ["llm.embed_tokens", "llm.last_layer", "llm.lm_head"]


def part(group: str, name: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        node = OmegaConf.to_container(compose(f"model/{group}/{name}")["model"][group])
    assert isinstance(node, dict)
    return {str(k): v for k, v in node.items() if not str(k).startswith("_")}


def meta(vision: str, llm: str, projector: Callable[[int, int], Projector]) -> VLA:
    with torch.device("meta"):
        return VLA(
            vision_backbone=lambda: VisionBackbone(**part("vision_backbone", vision)),
            projector=projector,
            llm=lambda: CausalLM(**part("llm", llm)),
        )


def fused() -> VLA:
    return meta("dinosiglip_224", "llama2_7b", FusedMLP)


def siglip_only() -> VLA:
    return meta("siglip_224", "vicuna_7b", MLP)


def counts(vla: VLA) -> tuple[int, int]:
    everything = list(vla.parameters())
    return sum(p.numel() for p in everything), sum(p.numel() for p in everything if p.requires_grad)


@LARGEST
@pytest.mark.parametrize(("build", "variant"), [(fused, "openvla-7b"), (siglip_only, "siglip-only")])
def test_names_and_shapes_are_the_released_ones(each_golden: Path, build: Callable[[], VLA], variant: str) -> None:
    variants = json.loads((each_golden / "model" / "openvla7b_hf_keys.json").read_text())["variants"]
    expected = next(v for k, v in variants.items() if k.startswith(variant))["keys"]
    ours = {name: list(tensor.shape) for name, tensor in build().state_dict().items()}
    assert ours == {name: entry["shape"] for name, entry in expected.items()}


STAGES = {
    "vla-full-train": ALL,
    "vla-train": ["projector", "llm"],
    "vla-sandwich-train": ["vision_backbone", "projector", *LAST],
    "vla-last-layer-train": LAST,
    "align": ["projector"],
}
"""Stages of the released training -> what learns."""


@LARGEST
@pytest.mark.parametrize(("build", "variant"), [(fused, "fused"), (siglip_only, "siglip_only")])
def test_trainable_parameters_of_partial_strategies(each_golden: Path, build: Callable[[], VLA], variant: str) -> None:
    released = json.loads((each_golden / "model" / "lora_and_trainable_counts.json").read_text())["native_stages"][
        variant
    ]
    vla = build()
    for stage, parts in STAGES.items():
        vla.requires_grad_(True)
        TrainOnly(parts).apply(vla)
        assert counts(vla) == (released[stage]["total"], released[stage]["trainable"]), stage


OF_ADAPTERS = {32: (110_828_288, 97_603_968), 64: (221_656_576, 195_207_936)}
"""Rank -> parameters that learn, of the fused model and of the one with SigLIP alone."""


def test_trainable_parameters_of_released_adapters(each_golden: Path) -> None:
    released = json.loads((each_golden / "model" / "lora_and_trainable_counts.json").read_text())["lora"]
    for rank, expected in OF_ADAPTERS.items():
        assert expected == tuple(released[f"{variant}_r{rank}"]["trainable"] for variant in ("fused", "siglip_only"))


@pytest.mark.parametrize("rank", OF_ADAPTERS)
def test_trainable_parameters_of_lora(rank: int) -> None:
    for build, learning in zip((fused, siglip_only), OF_ADAPTERS[rank], strict=True):
        vla = build()
        with torch.device("meta"):
            LoRA(rank).apply(vla)
        assert counts(vla)[1] == learning


LLAMA = 32 * 4096  # layers x width; what follows x rank is a number of parameters
ROWS = {"attention": LLAMA * 4 * 2, "mlp": LLAMA * 3 + 32 * 3 * 11008}
VITS = {"dino": (24, 1024, 4096), "siglip": (27, 1152, 4304)}


@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_trainable_parameters_of_chosen_targets(targets: str) -> None:
    """Counted from the architectures' published sizes."""
    vit = {"attention": lambda d, w, h: d * (w + 3 * w + w + w), "mlp": lambda d, w, h: 2 * d * (w + h)}[targets]
    rows, pool = ROWS[targets], {"attention": 0, "mlp": vit(1, 1152, 4304)}[targets]  # SigLIP ends in one more MLP
    vla = fused()
    with torch.device("meta"):
        LoRA(16, targets=targets).apply(vla)
    assert counts(vla)[1] == 16 * (rows + pool + sum(vit(*size) for size in VITS.values()))
    vla = fused()
    with torch.device("meta"):
        LoRA(16, targets=targets, within=["llm"], also_train=["projector"]).apply(vla)
    assert counts(vla)[1] == 16 * rows + 71_385_600


def test_table_1() -> None:
    """The paper's column, in millions, as conf/strategy gives it (SigLIP only)."""
    paper = {"full": 7188.1, "last_layer": 465.1, "frozen_vision": 6760.4, "sandwich": 914.2, "lora": 97.6}
    for name, millions in paper.items():
        with initialize_config_dir(str(CONF.parent), version_base="1.3"):
            strategy = compose("finetune", [f"strategy={name}"]).strategy
        vla = siglip_only()
        with torch.device("meta"):
            instantiate(strategy, _convert_="all").apply(vla)
        assert round(counts(vla)[1] / 1e6, 1) == millions, name


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "vision_backbone").glob("[!_]*.yaml")))
def test_every_vision_backbone_builds(name: str) -> None:
    arguments = part("vision_backbone", name)
    with torch.device("meta"):
        backbone = VisionBackbone(**arguments)
    patch = 16 if name == "tiny" else 14
    assert backbone.num_patches == (backbone.image_size // patch) ** 2
    assert backbone.dim == sum(tower.num_features for tower in backbone.featurizers)


LLM_SIZES = {
    "llama2_7b": 6_738_939_904,
    "vicuna_7b": 6_738_939_904,
    "llama2_13b": 13_016_519_680,
    "vicuna_13b": 13_016_519_680,
    "mistral_7b": 7_242_256_384,
    "phi2": 2_779_683_840,
    "qwen25_05b": 494_032_768,
    "qwen25_15b": 1_543_714_304,
    "smollm2": 361_821_120,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "llm").glob("[!_]*.yaml")))
def test_every_llm_builds_and_sets_action_ids_apart(name: str) -> None:
    arguments = part("llm", name)
    with torch.device("meta"):
        llm = CausalLM(**arguments)
    assert llm.lm_head.weight.shape == (arguments["architecture"]["vocab_size"], llm.dim)
    if name in LLM_SIZES:
        assert sum(p.numel() for p in llm.parameters()) == LLM_SIZES[name]
    specials = {arguments["architecture"][f"{kind}_token_id"] for kind in ("bos", "eos", "pad")}
    actions = range(arguments["vocab_size"] - 256, arguments["vocab_size"])
    assert not specials & set(actions)
    assert max(specials) < arguments["architecture"]["vocab_size"]


@LARGEST
def test_a_new_model_writes_the_released_config(each_golden: Path) -> None:
    variants = json.loads((each_golden / "model" / "openvla7b_hf_keys.json").read_text())["variants"]
    expected = next(v for k, v in variants.items() if k.startswith("openvla-7b"))
    ours = released_config(fused().config, {}, torch.bfloat16)
    text = ours.pop("text_config")
    assert {k: v for k, v in expected["config"].items() if k not in ("text_config", "norm_stats")} == {
        k: v for k, v in ours.items() if k not in ("auto_map", "architectures")
    }
    assert text.items() >= expected["config"]["text_config"].items()
    same_meaning = {k: v for k, v in text.items() if k in expected["config_full_text"]}
    assert same_meaning.items() <= expected["config_full_text"].items()
