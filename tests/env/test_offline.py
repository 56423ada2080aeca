"""Held-out steps in place of a simulator."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from openvla_lightning.action_head import TokenHead
from openvla_lightning.env.offline import Offline
from openvla_lightning.evaluation import evaluate, score_offline
from openvla_lightning.model import VLA
from openvla_lightning.model.llm import CausalLM
from openvla_lightning.model.projector import MLP
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.policy import Policy
from openvla_lightning.processor import Processor
from openvla_lightning.results import Results
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Step

TOWERS = {"tiny": {"id": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 8]}}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 768,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
STATISTICS = DatasetStatistics.from_array(
    np.linspace(-np.arange(1, 8), np.arange(2, 9), 101), mask=[True] * 6 + [False]
)


class HeldOut:
    """A held-out split that is a list; batches of three."""

    def __init__(self, steps: list[Step], collate: Callable, image_size: int, normalisation: str) -> None:
        self.steps, self.collate, self.settings = steps, collate, (image_size, normalisation)
        self.mix = dict.fromkeys((step.dataset_name for step in steps), 1.0)
        self.done: list[str] = []

    def check(self) -> None:
        """Nothing is missing from a list."""

    def prepare_data(self) -> None:
        """Comes before `setup`."""
        self.done.append("prepared")

    def setup(self, stage: str) -> None:
        """The statistics are known once the datasets are open."""
        assert self.done == ["prepared"]
        assert self.settings == (32, "quantile"), "as the policy was trained"
        self.statistics = dict.fromkeys(self.mix, STATISTICS)

    def val_dataloader(self):
        """Batches in order."""
        return (self.collate(self.steps[i : i + 3]) for i in range(0, len(self.steps), 3))


class Absent(HeldOut):
    """A dataset nobody has downloaded."""

    def check(self) -> None:
        """Say so."""
        raise FileNotFoundError("toy is not there")


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(1)
    vla = VLA(
        vision_backbone=lambda: VisionBackbone(towers=TOWERS, image_size=32, pretrained=False),
        projector=MLP,
        llm=lambda: CausalLM(name="tiny", vocab_size=768, architecture=LLAMA, pretrained=False),
    )
    with torch.no_grad():  # a head that prefers the action ids, as a trained one does
        vla.language_model.lm_head.weight[:512] = 0
        vla.language_model.lm_head.weight[512:].mul_(50)
    processor = Processor(TokenHead(vocab_size=768), tokenizer="tiny", image_size=32, towers=TOWERS)
    return Policy(vla, processor, {"toy": STATISTICS}, device="cpu")


@pytest.fixture(scope="module")
def steps(policy: Policy) -> list[Step]:
    """Steps on which the policy is always right."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(8):
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        words = f"lift the {('red', 'blue')[index % 2]} cube"
        action = STATISTICS.normalise(policy.act(image, words))[None]
        made.append(Step({"primary": image}, words, action, "toy"))
    return made


def offline(steps: list[Step], kind: type[HeldOut] = HeldOut, **kwargs) -> Offline:
    return Offline(functools.partial(kind, steps), **kwargs)


def test_a_policy_that_is_always_right_scores_so(policy, steps):
    scores = score_offline(policy, offline(steps), Console(quiet=True))
    assert scores["dataset"] == "toy"
    assert scores["steps"] == 8
    assert scores["token_accuracy"] == 1.0
    assert scores["l1"] == 0.0
    assert list(scores["dimensions"]) == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    # float32 between normalise and the dataset's units
    assert all(values["l1_executed"] < 1e-5 for values in scores["dimensions"].values())


def test_an_error_shows_in_its_own_dimension_and_in_the_datasets_units(policy, steps):
    def shifted(step: Step) -> Step:
        action = step.action.copy()
        action[0, 1] = -action[0, 1] + (0.5 if abs(action[0, 1]) < 0.1 else 0.0)
        return replace(step, action=action)

    moved = [shifted(step) for step in steps]
    scores = score_offline(policy, offline(moved), Console(quiet=True))["dimensions"]
    assert scores["y"]["token_accuracy"] == 0.0
    normalised = np.mean([abs(a.action[0, 1] - b.action[0, 1]) for a, b in zip(steps, moved, strict=True)])
    assert scores["y"]["l1"] == pytest.approx(normalised, abs=1 / 128)
    span = STATISTICS.action["q99"][1] - STATISTICS.action["q01"][1]
    assert scores["y"]["l1_executed"] == pytest.approx(normalised * span / 2, rel=1e-4)
    assert scores["x"]["token_accuracy"] == 1.0, "it comes before the error"
    assert all(values["l1_executed"] < 1e-5 for name, values in scores.items() if name != "y")


def test_so_many_steps_and_no_more(policy, steps):
    for wanted, sizes in {5: [3, 2], 6: [3, 3], 100: [3, 3, 2]}.items():
        batches, _ = offline(steps, num_steps=wanted).open(32, "quantile")
        assert [len(batch) for batch in batches] == sizes
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        offline(steps, num_steps=0)


def test_one_dataset_of_a_mixture(policy, steps):
    mixed = [replace(step, dataset_name="other") if i % 2 else step for i, step in enumerate(steps)]
    assert score_offline(policy, offline(mixed, dataset="other"), Console(quiet=True))["steps"] == 4
    with pytest.raises(ValueError, match=r"choose a dataset: env\.dataset=\.\.\. takes one of toy, other"):
        offline(mixed).check()
    with pytest.raises(ValueError, match="dataset 'third' is not held out here"):
        offline(mixed, dataset="third").check()


def test_an_offline_evaluation_leaves_results_and_a_report(policy, steps, tmp_path):
    found = evaluate(policy, offline(steps), tmp_path, label="mine", console=Console(quiet=True))
    assert Results.load(tmp_path) == found
    assert found.env == "offline"
    assert "| gripper | 100.0 % | 0.0000 |" in (tmp_path / "report.md").read_text()
    with pytest.raises(TypeError, match="needs a Policy"):
        evaluate(object, offline(steps), tmp_path, console=Console(quiet=True))


def test_absent_data_is_said_before_the_policy_is_loaded(steps, tmp_path):
    def load():
        raise AssertionError("loaded")

    with pytest.raises(FileNotFoundError, match="toy is not there"):
        evaluate(load, offline(steps, Absent), tmp_path, console=Console(quiet=True))


def test_an_empty_split_is_named(policy, steps):
    class Empty(HeldOut):
        def val_dataloader(self):
            return []

    with pytest.raises(ValueError, match="no held-out steps"):
        score_offline(policy, offline(steps, Empty), Console(quiet=True))
