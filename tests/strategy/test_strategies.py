"""Which weights learn, on a real tiny VLA: exactly the named parts, and they move."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from openvla_lightning.model import VLA
from openvla_lightning.strategy import LoRA, TrainOnly, from_config, to_config
from openvla_lightning.strategy.lora import merge

CONF = Path(__file__).parents[2] / "conf"
STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))


@pytest.fixture
def vla() -> VLA:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["paths.output_dir=/tmp/out"])
    torch.manual_seed(0)
    return instantiate(cfg.model, _convert_="all")()


def inputs(vla: VLA) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    backbone = vla.vision_backbone
    size = backbone.image_size
    ids = torch.randint(3, 200, (2, 12), generator=generator)
    pixels = torch.randn(2, 3 * len(backbone.towers), size, size, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "labels": ids.clone()}


def learning(vla: VLA) -> set[str]:
    return {name for name, parameter in vla.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("choice", STRATEGIES)
def test_only_what_learns_moves(vla: VLA, choice: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        strategy = instantiate(compose("finetune", [f"strategy={choice}"]).strategy, _convert_="all")
    strategy.apply(vla)
    before = {name: p.detach().clone() for name, p in vla.named_parameters()}
    optimizer = torch.optim.SGD([p for p in vla.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # an adapter's A sees no gradient before its B has moved
        optimizer.zero_grad()
        vla(**inputs(vla)).loss.backward()
        optimizer.step()
    moved = {name for name, p in vla.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= learning(vla)


def test_parts_are_exactly_the_ones_named(vla: VLA) -> None:
    TrainOnly(["projector", "llm.last_layer"]).apply(vla)
    layers = len(vla.llm.model.layers)
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in learning(vla)} == {"projector", "language_model"}
    assert all(f"layers.{layers - 1}." in name for name in learning(vla) if name.startswith("language_model"))


def test_the_five_strategies_nest_as_in_table_1(vla: VLA) -> None:
    names = {}
    for choice in ("full", "frozen_vision", "sandwich", "last_layer"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            instantiate(compose("finetune", [f"strategy={choice}"]).strategy, _convert_="all").apply(vla)
        names[choice] = learning(vla)
    assert names["full"] == {name for name, _ in vla.named_parameters()}
    assert names["last_layer"] < names["sandwich"] < names["full"]
    assert names["last_layer"] < names["frozen_vision"] < names["full"]
    assert not any(name.startswith("vision_backbone") for name in names["frozen_vision"])


def test_lora_changes_nothing_until_it_has_learnt(vla: VLA) -> None:
    vla.eval()
    before = vla(**inputs(vla)).logits
    LoRA(rank=4).apply(vla)
    torch.testing.assert_close(vla(**inputs(vla)).logits, before)
    assert all("lora_" in name for name in learning(vla))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"targets": "linear"}])
def test_merged_adapters_give_the_same_logits_under_the_base_names(vla: VLA, options: dict) -> None:
    names = set(vla.state_dict())
    LoRA(rank=4, **options).apply(vla)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in vla.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    vla.eval()
    adapted = vla(**inputs(vla)).logits
    merge(vla)
    torch.testing.assert_close(vla(**inputs(vla)).logits, adapted, atol=1e-4, rtol=1e-4)
    assert set(vla.state_dict()) == names


def test_alpha_follows_the_rank_as_released() -> None:
    assert [LoRA(rank=rank).alpha for rank in (4, 16, 32, 64)] == [4, 16, 16, 16]


def test_adapters_stay_within_the_parts_named(vla: VLA) -> None:
    LoRA(rank=2, within=["llm.last_layer", "projector"], also_train=["llm.embed_tokens"]).apply(vla)
    last = f"language_model.model.layers.{len(vla.llm.model.layers) - 1}."
    adapters = {name for name in learning(vla) if "lora_" in name}
    assert {name.startswith((last, "projector.")) for name in adapters} == {True}
    assert learning(vla) - adapters == {"language_model.model.embed_tokens.weight"}


def test_what_learns_in_full_has_no_adapter_beside(vla: VLA) -> None:
    LoRA(rank=2, also_train=["llm"]).apply(vla)
    assert not any("lora_" in name for name in learning(vla) if name.startswith("language_model"))
    assert any("lora_" in name for name in learning(vla))


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj", "qkv", "proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj", "fc1", "fc2"}),
        ("*.layers.0.self_attn.*", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["lm_head", "*.layers.[12].mlp.up_proj"], {"lm_head", "up_proj"}),
    ],
)
def test_targets_by_kind_and_pattern(vla: VLA, targets: str | list[str], ends: set[str]) -> None:
    LoRA(rank=2, targets=targets).apply(vla)
    adapted = {name.split(".lora_")[0] for name in learning(vla)}
    assert {name.rpartition(".")[2] for name in adapted} <= ends
    assert {name.rpartition(".")[2] for name in adapted if name.startswith("language_model")} == {
        end for end in ends if end.endswith("_proj") or end == "lm_head"
    }
    assert not any("patch_embed" in name for name in adapted)


def test_a_frozen_base_in_half_precision_learns_in_full(vla: VLA) -> None:
    vla.to(torch.bfloat16)
    LoRA(rank=2, also_train=["projector"]).apply(vla)
    assert {p.dtype for p in vla.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in vla.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        vla(**inputs(vla)).loss.backward()
    gradients = [p.grad for name, p in vla.named_parameters() if p.requires_grad and not name.startswith("vision")]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("within", [None, ["llm"]])
def test_recomputing_activations_changes_no_gradient(vla: VLA, within: list[str] | None) -> None:
    """Also where nothing below the first layer learns, so that its input asks for no gradient."""
    LoRA(rank=2, within=within, init=False).apply(vla)
    vla.train()
    gradients = []
    for _ in range(2):
        vla.zero_grad()
        vla(**inputs(vla)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in vla.named_parameters() if p.grad is not None})
        vla.llm.model.gradient_checkpointing_enable()
    assert gradients[0].keys() == gradients[1].keys()
    # of the vision tower the last blocks are not used
    assert {name for name in learning(vla) if not name.startswith("vision")} <= gradients[0].keys() <= learning(vla)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_named_targets_and_parts_in_full(vla: VLA) -> None:
    LoRA(rank=2, targets=["q_proj", "v_proj"], also_train=["projector"]).apply(vla)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in learning(vla) if "lora_" in name}
    assert adapted == {"q_proj", "v_proj"}
    assert any(name.startswith("projector") for name in learning(vla))


@pytest.mark.parametrize(
    "strategy", [TrainOnly(["projector"]), LoRA(rank=3, targets=["q_proj"], dropout=0.1, also_train=["projector"])]
)
def test_a_checkpoint_rebuilds_the_strategy(strategy: TrainOnly | LoRA) -> None:
    again = from_config(to_config(strategy))
    assert type(again) is type(strategy)
    assert again.config == strategy.config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainOnly("projector"), "list of part names"),
        (lambda: TrainOnly([]), "non-empty"),
        (lambda: LoRA(rank=0), "at least 1"),
        (lambda: LoRA(rank=1, dropout=1.0), "below 1"),
        (lambda: LoRA(rank=1, alpha=0), "alpha scales what the adapters learn"),
        (lambda: from_config({"name": "Prefix"}), r"openvla_lightning\.strategy\.Prefix cannot be imported"),
    ],
)
def test_mistakes_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_parts_and_targets_are_named(vla: VLA) -> None:
    with pytest.raises(KeyError, match=r"llm\.last_layer"):
        TrainOnly(["llm.last"]).apply(vla)
    with pytest.raises(ValueError, match="match no module of this model; choose released, linear, attention, mlp"):
        LoRA(rank=2, targets=["query"]).apply(vla)
    with pytest.raises(ValueError, match="match no module of projector"):
        LoRA(rank=2, targets="attention", within=["projector"]).apply(vla)
    with pytest.raises(KeyError, match=r"llm\.last_layer"):
        LoRA(rank=2, within=["head"]).apply(vla)
