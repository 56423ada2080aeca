"""The check of acting against training: it passes on what agrees and names the stage that does not."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from openvla_lightning.action_head import TokenHead
from openvla_lightning.data import VLADataModule
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.env.recorded import TrainingSteps
from openvla_lightning.evaluation.open_loop import StageError, check_open_loop, logged_accuracy
from openvla_lightning.model import VLA
from openvla_lightning.policy import Policy
from openvla_lightning.processor import Processor
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Inputs, Observation

TOWERS = {"tiny": {"id": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 8]}}
CONFIG: dict[str, Any] = {
    "vision_backbone": {"towers": TOWERS, "image_size": 32},
    "projector": {"kind": "mlp"},
    "llm": {
        "name": "tiny",
        "vocab_size": 768,
        "architecture": {
            "model_type": "llama",
            "vocab_size": 768,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pad_token_id": 0,
        },
    },
}
DATA = partial(
    VLADataModule,
    source=partial(Synthetic, num_steps=64, image_size=40),
    mix={"toy": 1.0},
    global_batch_size=16,
    num_workers=0,
    datasets={"toy": {"action": ["action"], "cameras": {"primary": "image"}}},
)


@pytest.fixture(scope="module")
def statistics() -> DatasetStatistics:
    data = DATA(collate=list, image_size=32)
    data.prepare_data()
    data.setup()
    return data.statistics["toy"]


@pytest.fixture
def policy(statistics: DatasetStatistics) -> Policy:
    """Has learnt nothing, but acts as it would train."""
    torch.manual_seed(0)
    processor = Processor(TokenHead(vocab_size=768), tokenizer="tiny", image_size=32, towers=TOWERS)
    vla = VLA.from_config(CONFIG)
    with torch.no_grad():
        for parameter in vla.parameters():
            parameter.mul_(3.0)
    return Policy(vla, processor, {"toy": statistics}, device="cpu")


@pytest.fixture
def env() -> TrainingSteps:
    return TrainingSteps(DATA, num_steps=32)


def write_log(folder: Path, accuracy: float, policy: Policy) -> None:
    rows = "".join(f"{step},{accuracy},{accuracy}\n" for step in range(20))
    (folder / "metrics.csv").write_text("step,train/action_accuracy,train/action_accuracy/toy\n" + rows)
    policy.provenance["path"] = str(folder / "checkpoints" / "step_000020.ckpt")


def test_what_agrees_passes(policy: Policy, env: TrainingSteps, tmp_path: Path) -> None:
    write_log(tmp_path, 0.0, policy)
    values = check_open_loop(policy, env, tmp_path)
    assert 0 <= values["token_accuracy"] <= 1
    assert values["l1_acting"] > 0
    page = (tmp_path / "open_loop.md").read_text()
    assert "NO" not in page
    assert all(stage in page for stage in ("pictures", "words", "decoding", "units", "training log"))


def test_a_crop_is_no_difference(policy: Policy, env: TrainingSteps, tmp_path: Path) -> None:
    cropped = Processor.from_config(policy.processor.config, crop_area=0.9)
    check_open_loop(Policy(policy.vla, cropped, {"toy": policy.statistics}, device="cpu"), env, tmp_path)


def test_other_units_are_named(policy: Policy, env: TrainingSteps, tmp_path: Path) -> None:
    values = policy.statistics.to_dict()
    values["action"]["q99"] = [2 * value + 1 for value in values["action"]["q99"]]
    policy.statistics = DatasetStatistics.from_dict(values)
    with pytest.raises(StageError, match="units"):
        check_open_loop(policy, env, tmp_path)


def test_other_words_are_named(
    policy: Policy, env: TrainingSteps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Processor.inputs

    def shouting(self: Processor, observations: list[Observation], *given: Any) -> Inputs:
        return inputs(self, [replace(seen, instruction=f"{seen.instruction}!") for seen in observations], *given)

    monkeypatch.setattr(Processor, "inputs", shouting)
    with pytest.raises(StageError, match="words"):
        check_open_loop(policy, env, tmp_path)


def test_a_decoder_of_its_own_mind_is_named(policy: Policy, env: TrainingSteps, tmp_path: Path) -> None:
    targets = iter([*env_targets(policy, env)] * 8)  # untrained it is wrong; a right answer cannot be its own
    policy.vla.generate = lambda **inputs: torch.stack([next(targets) for _ in inputs["input_ids"]])  # type: ignore
    with pytest.raises(StageError, match="decoding"):
        check_open_loop(policy, env, tmp_path)


def env_targets(policy: Policy, env: TrainingSteps) -> torch.Tensor:
    batches, _, _ = env.open(image_size=32, normalisation="quantile")
    actions = policy.processor.collate(next(iter(batches))).actions
    return policy.processor.action_head.encode(actions)


def test_less_than_training_logged_is_named(policy: Policy, env: TrainingSteps, tmp_path: Path) -> None:
    write_log(tmp_path, 0.9, policy)
    with pytest.raises(StageError, match=r"training log .*0\.900"):
        check_open_loop(policy, env, tmp_path)


def test_the_log_is_read_up_to_the_checkpoint(policy: Policy, tmp_path: Path) -> None:
    write_log(tmp_path, 0.5, policy)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("20,0.9,0.9\n")
    checkpoint = str(tmp_path / "checkpoints" / "step_000020.ckpt")
    assert logged_accuracy(checkpoint, ["toy"]) == (0.5, 0.0)
    assert logged_accuracy(checkpoint, ["other"]) == (0.5, 0.0)
    for name in (".", "checkpoints/step_best.ckpt"):  # a copy of another name
        whole = logged_accuracy(str(tmp_path / name), ["toy"])
        assert whole is not None
        assert whole[0] > 0.5
    assert logged_accuracy(str(tmp_path / "nowhere"), ["toy"]) is None
    assert logged_accuracy(None, ["toy"]) is None
