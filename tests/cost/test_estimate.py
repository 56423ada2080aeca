"""The estimate against arithmetic, and against the sizes that are known of the real model."""

import io
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from tiny_parts import LLAMA, TOWERS

from openvla_lightning.action_head import TokenHead
from openvla_lightning.config import CONF, validate
from openvla_lightning.cost.cards import CARDS, card
from openvla_lightning.cost.estimate import Estimate, Spread, durations, estimate, plan, show
from openvla_lightning.model import VLA
from openvla_lightning.strategy import LoRA, TrainOnly

FULL = TrainOnly(["vision_backbone", "projector", "llm"])
ONE = Spread(devices=1, shards=1, batch=4, global_batch=8, max_steps=100, mixed=True)
TINY = {
    "vision_backbone": {"towers": TOWERS, "image_size": 32},
    "projector": {"kind": "linear"},
    "llm": {"name": "tiny", "architecture": LLAMA, "vocab_size": 768},
}


def tiny(plan: Spread = ONE, **options: Any) -> Estimate:
    head = TokenHead(vocab_size=768)
    return estimate(lambda **parts: VLA.from_config(TINY), options.pop("strategy", FULL), head, plan, **options)


def states(found: Estimate) -> float:
    """Bytes of weights, gradients and optimiser."""
    return sum(size for name, size in found.memory.items() if name.startswith(("weights", "gradients", "optimiser")))


def recipe(script: str, *overrides: str) -> tuple[Any, dict[str, Any]]:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(script, ["paths.output_dir=x", *overrides])
        return cfg, validate(cfg)


def test_bytes_of_a_parameter_are_those_of_its_states() -> None:
    found = tiny()
    computed = found.memory["weights to compute with"]
    assert states(found) - computed == pytest.approx(16 * found.parameters), "4 + 4 + 8 in float32"
    assert found.trainable == found.parameters
    small = tiny(kind="adamw_bf16")
    assert states(found) - states(small) == pytest.approx(4 * found.parameters)
    adapted = tiny(strategy=LoRA(2), dtype="bfloat16")
    frozen = adapted.parameters - adapted.trainable
    states_of_learning = states(adapted) - adapted.memory["weights to compute with"] - 2 * frozen
    assert states_of_learning == pytest.approx(16 * adapted.trainable)
    assert adapted.checkpoint < 0.2 * found.checkpoint, "the adapter alone"


def test_memory_follows_the_plan() -> None:
    one = tiny()
    double = tiny(Spread(1, 1, batch=8, global_batch=8, max_steps=100, mixed=True))
    assert double.memory["activations"] == pytest.approx(2 * one.memory["activations"])
    sharded = tiny(Spread(2, 2, batch=4, global_batch=8, max_steps=100, mixed=True))
    for name in ("weights", "gradients", "optimiser (adamw)"):
        assert sharded.memory[name] == one.memory[name] / 2
    deep = TINY | {"llm": TINY["llm"] | {"architecture": TINY["llm"]["architecture"] | {"num_hidden_layers": 6}}}
    kept, again = (
        estimate(lambda **parts: VLA.from_config(deep), FULL, TokenHead(vocab_size=768), ONE, recompute=which)
        for which in ("none", "full")
    )
    assert again.flops > kept.flops
    assert again.memory["activations"] < kept.memory["activations"]


def test_time_follows_the_plan() -> None:
    one, eight = tiny(), tiny(Spread(8, 1, batch=1, global_batch=8, max_steps=100, mixed=True))
    known = CARDS[0]
    assert eight.samples_per_second(known) == pytest.approx(8 * one.samples_per_second(known))
    rate = one.samples_per_second(known)
    assert rate * one.flops == pytest.approx(0.4 * known.tflops * 1e12)
    assert [row[0] for row in durations(one)[1:]] == [known.name for known in CARDS]


@pytest.mark.parametrize(
    ("script", "overrides", "expected"),
    [
        ("train", ["+experiment=oxe_full"], Spread(64, 64, 32, 2048, 150_000, True)),
        ("finetune", ["+experiment=lora_24gb"], Spread(1, 1, 8, 16, 50_000, True)),
        ("finetune", ["+experiment=lora_80gb", "batch_size_per_device=4"], Spread(1, 1, 4, 16, 50_000, True)),
        (
            "train",
            ["trainer=fsdp", "trainer.devices=4", "trainer.strategy.replicas=2"],
            Spread(4, 2, 16, 64, 1500, True),
        ),
        ("train", ["trainer=cpu", "data.action_chunk=2"], Spread(1, 1, 64, 64, 1500, False)),
    ],
)
def test_plans_are_read_from_recipes(script: str, overrides: list[str], expected: Spread) -> None:
    assert plan(recipe(script, *overrides)[1]) == expected


def shown(script: str, *overrides: str) -> tuple[Estimate, str]:
    cfg, resolved = recipe(script, *overrides)
    console = Console(record=True, width=120, file=io.StringIO())
    parts = (instantiate(cfg[name], _convert_="all") for name in ("model", "strategy", "action_head", "quantisation"))
    return show(*parts, resolved, console), console.export_text()


@pytest.mark.slow
def test_robots_of_other_widths_and_several_cameras_are_estimated() -> None:
    small = ["model=tiny", "model/vision_backbone=tiny_vit", "model/llm=tiny", "model.init_from=null"]
    three, _ = shown("finetune", "+experiment=aloha_oft", *small)
    one, _ = shown("finetune", "+experiment=aloha_oft", *small, "data.cameras=[primary]")
    assert three.flops > 1.2 * one.flops
    assert three.memory["activations"] > 1.2 * one.memory["activations"]
    flow, _ = shown("train", "action_head=flow", "data.proprio=true", "action_head.proprio_dim=9")
    assert flow.flops > 0


@pytest.mark.slow
def test_the_recipe_for_24_gb_fits_24_gb() -> None:
    """openvla-7b: parameters as published; 4 bits where quantised; the language model's activations recomputed."""
    found, text = shown("finetune", "+experiment=lora_24gb")
    assert found.parameters == 7_541_237_184 + 110_828_288
    assert found.trainable == 110_828_288
    assert 4.5e9 < found.memory["weights"] < 7e9
    assert found.checkpoint == pytest.approx(12 * found.trainable)
    for name in ("RTX 4090", "H200"):
        known = card(name)
        assert known is not None
        assert found.fits(known)
    assert "110,828,288 learn" in text
    assert "will not fit" not in text


@pytest.mark.slow
def test_what_fits_nowhere_is_said_with_what_would_help() -> None:
    """All weights of 7B on one device: 16 bytes of each, and activations of 64 samples."""
    found, text = shown("train", "model=openvla_7b")
    assert states(found) - found.memory["weights to compute with"] == pytest.approx(16 * 7_541_237_184)
    assert found.memory["weights to compute with"] == pytest.approx(2 * 7_541_237_184, rel=0.05)
    assert "will not fit on any" in text
    assert "checkpoint_activations=full" in text
