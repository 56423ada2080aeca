"""Quantised models act nearly like whole ones, carry adapters that learn, and those merge into the whole base."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from written import train_a_little, write_ckpt

from openvla_lightning import VLA
from openvla_lightning.action_head import TokenHead
from openvla_lightning.checkpoint.export import export, quantisation_gap, trained_quantisation
from openvla_lightning.model.checkpoint import load_vla, load_weights
from openvla_lightning.module import VLAModule
from openvla_lightning.optim import AdamW
from openvla_lightning.policy import Policy
from openvla_lightning.processor import Processor
from openvla_lightning.quantisation import FastQuantisation, Quantisation, dequantised, is_quantised, plain_state
from openvla_lightning.strategy import LoRA
from openvla_lightning.strategy.lora import merge

TOLERANCE = {8: 0.01, 4: 0.12}
"""Relative RMS of what a format changes in Gaussian weights: 0.6 % and 9 %."""


@pytest.fixture
def config(config: dict[str, Any]) -> dict[str, Any]:
    """Widths that 4-bit blocks divide."""
    config["vision_backbone"]["towers"]["dino"]["embed_dim"] = 32
    config["llm"]["architecture"] |= {"hidden_size": 64, "intermediate_size": 128}
    return config


@pytest.fixture
def vla(config: dict[str, Any], build: Callable[..., VLA], vla: VLA) -> VLA:
    model = build(config)
    model.norm_stats = vla.norm_stats
    return model


@pytest.fixture
def folder(vla: VLA, tmp_path: Path) -> Path:
    vla.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantised_layers(vla: VLA) -> dict[str, nn.Module]:
    return {name: module for name, module in vla.named_modules() if is_quantised(module)}


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_become_what_the_format_allows_and_kept_parts_stay(vla: VLA, bits: int) -> None:
    quantised = Quantisation(bits)(copy.deepcopy(vla))
    layers = quantised_layers(quantised)
    assert {name.partition(".")[0] for name in layers} == {"projector", "language_model"}
    assert "language_model.lm_head" not in layers
    for name, layer in layers.items():
        before = vla.get_submodule(name).weight
        change = (dequantised(layer) - before).norm() / before.norm()
        assert 0 < change < TOLERANCE[bits], name
    kept = {name: p for name, p in vla.named_parameters() if name.removesuffix(".weight") not in layers}
    own = dict(quantised.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in kept.items() if not name.endswith("bias"))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_memory_shrinks(vla: VLA, bits: int) -> None:
    quantised = Quantisation(bits, keep=[])(copy.deepcopy(vla))
    for name, layer in quantised_layers(quantised).items():
        assert layer.weight.nbytes * 32 // bits == vla.get_submodule(name).weight.nbytes


def test_more_bits_are_nearer(vla: VLA, batch: dict[str, Any]) -> None:
    whole = vla(**batch).logits
    errors = [(Quantisation(bits)(copy.deepcopy(vla))(**batch).logits - whole).abs().mean() for bits in (8, 4)]
    assert 0 < errors[0] < errors[1] < whole.abs().mean()


def test_a_policy_acts_quantised_and_is_never_cast(folder: Path) -> None:
    policies = [
        Policy.from_pretrained(folder, device="cpu", dtype=dtype, quantisation=Quantisation(bits))
        for bits in (8, 4)
        for dtype in ("float32", "bfloat16")
    ]
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 60, 60, 3), dtype=np.uint8))
    for policy in policies:
        actions = policy.act(pictures, ["lift", "push", "put it down"])
        assert np.isfinite(actions).all()
        assert len(np.unique(actions, axis=0)) > 1
        assert policy.provenance["quantisation"]["bits"] in (4, 8)
        assert {layer.weight.dtype for layer in quantised_layers(policy.vla).values()} <= {torch.uint8, torch.int8}
    again = Policy(policies[0].vla, policies[0].processor, policies[0].vla.norm_stats, device="cpu", dtype="bfloat16")
    np.testing.assert_array_equal(again.act(pictures[0], "lift"), policies[0].act(pictures[0], "lift"))


def qlora(base: Path, config: dict[str, Any], bits: int = 4) -> VLA:
    vla = VLA.from_config(config)
    load_weights(vla, base)
    Quantisation(bits)(vla)
    LoRA(rank=4).apply(vla)
    return vla.train()


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_a_base_that_does_not(
    folder: Path, config: dict[str, Any], batch: dict[str, Any], bits: int
) -> None:
    vla = qlora(folder, config, bits)
    before = {name: layer.weight.clone() for name, layer in quantised_layers(vla).items()}
    optimizer = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(30):
        if step == 15:  # validation in between changes nothing
            vla.eval()
            with torch.inference_mode():
                vla.generate(**batch)
            vla.train()
        loss = vla(**batch, labels=batch["input_ids"].masked_fill(~batch["attention_mask"], -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in quantised_layers(vla).items())
    assert all(".lora_" in name for name, p in vla.named_parameters() if p.requires_grad)
    assert len([name for name in quantised_layers(vla) if name.endswith("base_layer")]) == len(before)


@pytest.fixture
def trained(folder: Path, config: dict[str, Any], vla: VLA, tmp_path: Path) -> tuple[Path, VLA]:
    """An adapter's checkpoint from a 4-bit base, and the live model."""
    live = qlora(folder, config).eval()
    train_a_little(live, 0.05)
    path = tmp_path / "run/checkpoints/step_000010.ckpt"
    write_ckpt(path, live, LoRA(rank=4), vla.norm_stats, folder)
    return path, live


def test_an_adapter_from_a_quantised_base_goes_onto_the_whole_one(
    trained: tuple[Path, VLA], vla: VLA, batch: dict[str, Any]
) -> None:
    path, live = trained
    merged = load_vla(path)
    assert not quantised_layers(merged)
    for name, module in merged.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("language_model.model"):
            adapter = live.get_submodule(name)
            delta = adapter.get_delta_weight("default")
            torch.testing.assert_close(module.weight, vla.get_submodule(name).weight + delta, atol=1e-5, rtol=1e-4)


def test_export_measures_what_the_whole_base_changes(
    trained: tuple[Path, VLA], batch: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, live = trained
    with caplog.at_level("INFO"):
        folder = export(path, tmp_path / "released")
    config = trained_quantisation(path)
    assert config is not None
    gap = quantisation_gap(path, folder, config)
    assert 0.05 < gap.weights < 0.12
    assert gap.logits > 0
    assert 0 <= gap.tokens <= 1
    assert gap.text() in (folder / "README.md").read_text()
    assert "in 4 bits" in caplog.text
    # against itself only the order of sums is left
    whole = tmp_path / "whole"
    plain = {name.replace(".base_layer", ""): t for name, t in plain_state(live, live.state_dict()).items()}
    same = VLA.from_config(live.config)
    same.load_state_dict({name: t for name, t in plain.items() if ".lora_" not in name})
    LoRA(rank=4).apply(same)
    same.load_state_dict({n: t for n, t in live.state_dict().items() if ".lora_" in n}, strict=False)
    same.norm_stats = live.norm_stats
    same.save_pretrained(whole)
    closer = quantisation_gap(path, whole, config)
    assert closer.logits < gap.logits / 20
    assert closer.tokens >= gap.tokens


def test_a_head_without_a_measure_of_this_is_exported_too(trained: tuple[Path, VLA], tmp_path: Path) -> None:
    path, _ = trained
    content = torch.load(path, weights_only=True)
    content["openvla_lightning"]["processor"]["action_head"]["parallel"] = True
    torch.save(content, path)
    folder = export(path, tmp_path / "released")
    assert "The adapter was trained on the base in 4 bits and is merged into" in (folder / "README.md").read_text()
    assert Processor.from_pretrained(folder).action_head.config["parallel"]


def test_the_numbers_behind_a_quantised_model_can_be_kept(trained: tuple[Path, VLA], config: dict[str, Any]) -> None:
    _, live = trained
    plain = plain_state(live, live.state_dict())
    expected = VLA.from_config(config)
    LoRA(rank=4).apply(expected)
    assert list(plain) == list(expected.state_dict())
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}


@pytest.mark.parametrize("width", [32, 48, 64, 80, 96, 128, 160, 344, 4304])
def test_what_is_quantised_on_a_cpu_is_read_as_it_was_written(width: int) -> None:
    """bitsandbytes' own kernel mixes up blocks at some of these widths; those layers have to stay whole."""
    linear = nn.Linear(width, 64, bias=False)
    divisor = Quantisation(4)._divisor(torch.device("cpu"))
    assert divisor == 64
    if width % divisor == 0:
        layer = Quantisation(4)._quantised(linear, torch.device("cpu"))
        assert (dequantised(layer) - linear.weight).norm() < 0.12 * linear.weight.norm()


def test_mistakes_are_named(vla: VLA, build: Callable[..., VLA], config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose 4 or 8"):
        Quantisation(3)
    with pytest.raises(ValueError, match="nf4 or fp4"):
        Quantisation(4, kind="int4")
    with pytest.raises(KeyError, match="vision_backbone, projector"):
        Quantisation(4, keep=["vision"])(build(config))
    quantised = Quantisation(4)(build(config))
    with pytest.raises(ValueError, match="already"):
        Quantisation(8)(quantised)
    with pytest.raises(ValueError, match="quantised"):
        quantised.save_pretrained(tmp_path)
    LoRA(rank=2).apply(quantised)
    with pytest.raises(ValueError, match="without quantisation"):
        merge(quantised)
    with pytest.raises(ValueError, match="projector"):
        LoRA(rank=2, also_train=["projector"]).apply(Quantisation(4)(build(config)))


KINDS = ("int8_weight", "int4_weight", "fp8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_format_acts_or_says_what_it_needs(folder: Path, kind: str) -> None:
    quantisation = FastQuantisation(kind)
    try:
        policy = Policy.from_pretrained(folder, device="cpu", dtype="float32", quantisation=quantisation)
    except ValueError as error:
        missing = "pip install 'openvla-lightning" if find_spec("torchao") is None else "compute capability 8"
        assert f"quantisation={kind} needs" in str(error)  # noqa: PT017
        assert missing in str(error)  # noqa: PT017
        assert missing.startswith("pip") or kind != "int8_weight", "runs on any device"
        return
    whole = Policy.from_pretrained(folder, device="cpu", dtype="float32")
    pictures = list(np.random.default_rng(0).integers(0, 256, (8, 60, 60, 3), dtype=np.uint8))
    words = [f"lift {number}" for number in range(8)]
    assert np.isfinite(policy.act(pictures, words)).all()
    given = policy.processor(pictures, words)
    with torch.inference_mode():
        near, exact = (vla(**given).logits for vla in (policy.vla, whole.vla))
    assert 0 < (near - exact).norm() < 0.1 * exact.norm()
    assert policy.provenance["quantisation"] == quantisation.config
    kept = {name for name, module in policy.vla.named_modules() if type(getattr(module, "weight", 0)) is nn.Parameter}
    assert not any(name.startswith(("projector", "language_model.model.layers")) and "proj" in name for name in kept)
    assert "language_model.lm_head" in kept
    with pytest.raises(ValueError, match="released layout"):
        policy.vla.save_pretrained(folder / "again")


def test_what_is_missing_is_said_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvla_lightning.quantisation.find_spec", lambda name: None)
    (tmp_path / "empty").mkdir()  # which is no checkpoint
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install"):
        Policy.from_pretrained(tmp_path / "empty", device="cpu", quantisation=Quantisation(4))
    with pytest.raises(ValueError, match=r"needs torchao: pip install"):
        Policy.from_pretrained(tmp_path / "empty", device="cpu", quantisation=FastQuantisation("fp8"))
    monkeypatch.setattr("openvla_lightning.quantisation.find_spec", lambda name: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    gpu = torch.device("cuda", 0)
    FastQuantisation("int4_weight").check(gpu, torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype=bfloat16"):
        FastQuantisation("int4_weight").check(gpu, torch.float32)
    with pytest.raises(ValueError, match=r"compute capability 8\.9 \(L40S"):
        FastQuantisation("fp8").check(gpu, torch.bfloat16)
    with pytest.raises(ValueError, match="int8_weight, int4_weight, fp8"):
        FastQuantisation("int2")


def test_a_format_for_acting_alone_is_not_trained_on(config: dict[str, Any]) -> None:
    processor = Processor(TokenHead(), tokenizer="tiny", image_size=56, means=[[0.5] * 3] * 2, stds=[[0.5] * 3] * 2)
    with pytest.raises(ValueError, match="acting alone"):
        VLAModule(
            model=lambda **parts: VLA.from_config(config),
            strategy=LoRA(rank=2),
            optim=AdamW(lr=1e-3),
            processor=processor,
            action_head=processor.action_head,
            quantisation=FastQuantisation("int8_weight"),
        )
