"""The same numbers as the released code, on a checkpoint it wrote. Tolerances: what two correct stacks differ by."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_sets import one
from torch import Tensor

from openvla_lightning import VLA, ActionTokenizer, DatasetStatistics
from openvla_lightning.model import VLAOutput
from openvla_lightning.strategy import LoRA
from openvla_lightning.strategy.lora import merge

needs_all_words = pytest.mark.parametrize("each_golden", ["whole"], indirect=True)
"""For what depends on the whole vocabulary, as losses do: the small set holds a part of it."""


@pytest.fixture(scope="module")
def folder(each_golden: Path) -> Path:
    """A checkpoint of the released code; in the small set with one sample, and a part of the vocabulary."""
    return one(each_golden / "model", "tiny_*")


@pytest.fixture(scope="module")
def arrays(folder: Path) -> dict[str, Any]:
    return dict(np.load(folder / "golden.npz"))


@pytest.fixture
def vla(folder: Path) -> VLA:
    return VLA.from_pretrained(folder, dtype=torch.float32)


def inputs(arrays: dict[str, Any], *names: str) -> dict[str, Tensor]:
    names = names or ("pixel_values", "input_ids", "attention_mask", "labels")
    return {name: torch.from_numpy(arrays[name]) for name in names}


@pytest.fixture(scope="module")
def output(folder: Path, arrays: dict[str, Any]) -> VLAOutput:
    vla = VLA.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return vla(**inputs(arrays), output_hidden_states=True)


def last_columns(logits: Tensor, arrays: dict[str, Any]) -> Tensor:
    """The logits of the vocabulary's end, from the first action id on, as many as the released ones."""
    return logits[..., -arrays["fwd/logits_action_cols"].shape[-1] :]


def close(actual: Tensor, expected: Any, atol: float) -> None:
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected).double(), atol=atol, rtol=0)


def test_patch_features(output: VLAOutput, arrays: dict[str, Any]) -> None:
    assert output.tower_features is not None
    released = [values for name, values in arrays.items() if name.endswith("_patch_features")]
    for ours, theirs in zip(output.tower_features, released, strict=True):
        close(ours, theirs, 5e-5)


def test_hidden_states(output: VLAOutput, arrays: dict[str, Any]) -> None:
    mask = arrays.get("compared", arrays["fwd/mm_attention_mask"])
    assert output.hidden_states is not None
    assert len(output.hidden_states) == len(arrays["fwd/hidden_states"])
    close(output.projector_features, arrays["fwd/projector_features"], 2e-4)  # type: ignore[arg-type]
    for ours, theirs in zip(output.hidden_states, arrays["fwd/hidden_states"], strict=True):
        close(ours[mask], theirs[mask], 2e-4)


def test_logits(output: VLAOutput, arrays: dict[str, Any]) -> None:
    mask = arrays.get("compared", arrays["fwd/mm_attention_mask"])
    assert mask[arrays["fwd/mm_attention_mask"]].sum() > 30
    close(last_columns(output.logits, arrays)[mask], arrays["fwd/logits_action_cols"][mask], 1e-3)
    close(output.logits[..., arrays["vocab_subset"]][mask], arrays["fwd/logits_vocab_subset"][mask], 1e-3)
    assert output.logits.dtype == torch.float32


@needs_all_words
def test_logits_of_all_words(output: VLAOutput, arrays: dict[str, Any]) -> None:
    mask = arrays["fwd/mm_attention_mask"]
    close(output.logits.logsumexp(-1)[mask], arrays["fwd/logsumexp"][mask], 1e-3)
    last = output.logits[torch.arange(len(mask)), arrays["fwd/last_prompt_position"]]
    close(last, arrays["fwd/logits_full_last_prompt"], 1e-3)


@needs_all_words
def test_loss(vla: VLA, output: VLAOutput, arrays: dict[str, Any]) -> None:
    close(output.loss, arrays["fwd/loss"], 2e-5)  # type: ignore[arg-type]
    with torch.no_grad():
        for row, expected in enumerate(arrays["single/loss"]):
            length = int(arrays["attention_mask"][row].sum())
            sample = {k: v[row : row + 1] for k, v in inputs(arrays, "pixel_values", "input_ids", "labels").items()}
            single = vla(
                pixel_values=sample["pixel_values"],
                input_ids=sample["input_ids"][:, :length],
                labels=sample["labels"][:, :length],
            )
            close(single.loss, expected, 2e-5)


@needs_all_words
def test_text_only(vla: VLA, arrays: dict[str, Any]) -> None:
    sample = {k: v[2:3] for k, v in inputs(arrays, "input_ids", "attention_mask", "labels").items()}
    with torch.no_grad():
        output = vla(pixel_values=None, **sample)
    real = arrays["attention_mask"][2]
    close(output.loss, arrays["text_only/loss"], 2e-5)
    close(last_columns(output.logits, arrays)[0, real], arrays["text_only/logits_action_cols"][0, real], 1e-3)


@needs_all_words
def test_gradients(vla: VLA, arrays: dict[str, Any]) -> None:
    vla(**inputs(arrays)).loss.backward()
    norms = dict(zip(arrays["grad/names"], arrays["grad/l2"], strict=True))
    ours = dict(vla.named_parameters())
    assert set(ours) == set(norms)
    for name, expected in norms.items():
        gradient = ours[name].grad
        if np.isnan(expected):
            assert gradient is None or not gradient.any(), name
        else:
            assert gradient is not None
            assert gradient.double().norm().item() == pytest.approx(expected, rel=1e-4, abs=1e-7), name


def test_greedy_ids_and_actions(vla: VLA, arrays: dict[str, Any]) -> None:
    for sample in range(len(arrays["input_ids"])):
        ids_and_actions(vla, arrays, sample)


def ids_and_actions(vla: VLA, arrays: dict[str, Any], sample: int) -> None:
    prompt = torch.from_numpy(arrays[f"gen/prompt_ids_{sample}"])[None]
    pixels = torch.from_numpy(arrays["pixel_values"][sample : sample + 1])
    with_space = torch.cat([prompt, torch.tensor([[29871]])], dim=1)
    new, without = (arrays[f"gen/new_ids{kind}_{sample}"].tolist() for kind in ("", "_no29871"))
    most = max(len(new), *(len(stats["action"]["q01"]) for stats in vla.norm_stats.values()))
    ids = vla.generate(pixel_values=pixels, input_ids=with_space, max_new_tokens=most)
    assert ids[0, : len(new)].tolist() == new
    bare = vla.generate(pixel_values=pixels, input_ids=prompt, max_new_tokens=len(without))
    assert bare[0].tolist() == without
    for key, stats in vla.norm_stats.items():
        statistics = DatasetStatistics.from_dict(stats)
        normalised = ActionTokenizer().decode(ids[0, : statistics.action_dim])
        action = statistics.unnormalise(normalised)
        np.testing.assert_allclose(action, arrays[f"predict_action/{key}/{sample}"], atol=1e-9, rtol=0)


@needs_all_words
def test_bf16_loss(folder: Path, arrays: dict[str, Any]) -> None:
    vla = VLA.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        close(vla(**inputs(arrays)).loss, arrays["bf16/loss"], 0.1)


@needs_all_words
def test_lora_loss_curve(vla: VLA, arrays: dict[str, Any]) -> None:
    """A few AdamW steps on the released adapters, from a start that both codes can write down; then merged."""
    LoRA(rank=32).apply(vla)
    adapters = {name: p for name, p in vla.named_parameters() if "lora_" in name}
    assert sum(p.numel() for p in adapters.values()) == arrays["lora/trainable_params"]
    with torch.no_grad():
        names = sorted(name for name in adapters if "lora_A" in name)
        for index, name in enumerate(names):
            flat = 0.1 * np.sin(0.37 * np.arange(adapters[name].numel(), dtype=np.float64) + 0.5 * index)
            adapters[name].copy_(torch.from_numpy(flat.astype(np.float32)).view_as(adapters[name]))
        for name in adapters.keys() - set(names):
            adapters[name].zero_()
    (name,) = (name for name in arrays if name.startswith("lora/adamw_lr") and name.endswith("_losses"))
    rate = name.removeprefix("lora/adamw_lr").removesuffix("_losses")
    optimiser = torch.optim.AdamW(adapters.values(), lr=float(rate))
    losses = []
    for _ in arrays[name]:
        loss = vla(**inputs(arrays)).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    np.testing.assert_allclose(losses, arrays[name], atol=1e-4, rtol=0)
    merge(vla)
    assert not any("lora" in name for name, _ in vla.named_parameters())
    with torch.no_grad():
        close(vla(**inputs(arrays)).loss, arrays[f"lora/merged_loss_after_{len(losses)}_steps"], 1e-4)


def test_round_trip_is_bit_equal(vla: VLA, folder: Path, tmp_path: Path) -> None:
    vla.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "dataset_statistics.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text()), name
