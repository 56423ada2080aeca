"""Held-out steps in place of a simulator."""

import functools
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_parts import TOWERS, tiny_vla

from openvla_lightning.action_head import TokenHead
from openvla_lightning.env.base import kind_of
from openvla_lightning.env.recorded import Offline, Replay, TrainingSteps
from openvla_lightning.env.tabletop import Tabletop
from openvla_lightning.evaluation.held_out import calibration, score_offline
from openvla_lightning.evaluation.scoring import evaluate
from openvla_lightning.policy import Policy
from openvla_lightning.processor import Processor
from openvla_lightning.report.comparison import compare_all
from openvla_lightning.report.results import Results
from openvla_lightning.run.evaluate import EVALUATIONS
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Observation, Step

STATISTICS = DatasetStatistics.from_array(
    np.linspace(-np.arange(1, 8), np.arange(2, 9), 101), mask=[True] * 6 + [False]
)


class HeldOut:
    """A held-out split that is a list; batches of three."""

    def __init__(self, steps: list[Step], collate: Callable, image_size: int, normalisation: str, **views: Any) -> None:
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
    vla = tiny_vla(1)
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
        made.append(Step(Observation({"primary": image}, words), action, "toy"))
    return made


def offline(steps: list[Step], kind: type[HeldOut] = HeldOut, **kwargs) -> Offline:
    return Offline(functools.partial(kind, steps), **kwargs)


def test_a_policy_that_is_always_right_scores_so(policy, steps):
    shown = StringIO()
    scores = score_offline(policy, offline(steps), Console(file=shown))
    assert "8 of 8 steps (100%)" in shown.getvalue(), "of what is held out, not of the 1,000 that are asked for"
    assert (scores["steps"], scores["token_accuracy"], scores["l1"]) == (8, 1.0, 0.0)
    scores = scores["datasets"]["toy"]
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
    scores = score_offline(policy, offline(moved), Console(quiet=True))["datasets"]["toy"]["dimensions"]
    assert scores["y"]["token_accuracy"] == 0.0
    normalised = np.mean([abs(a.action[0, 1] - b.action[0, 1]) for a, b in zip(steps, moved, strict=True)])
    assert scores["y"]["l1"] == pytest.approx(normalised, abs=1 / 128)
    span = STATISTICS.action["q99"][1] - STATISTICS.action["q01"][1]
    assert scores["y"]["l1_executed"] == pytest.approx(normalised * span / 2, rel=1e-4)
    assert scores["x"]["token_accuracy"] == 1.0, "it comes before the error"
    assert all(values["l1_executed"] < 1e-5 for name, values in scores.items() if name != "y")


def test_a_policy_that_listens_errs_when_told_another_task(policy, steps):
    found = score_offline(policy, offline(steps), Console(quiet=True))["datasets"]["toy"]["confusion"]
    assert set(found["tasks"]) == {"lift the red cube", "lift the blue cube"}
    errors = np.array(found["l1"])
    assert (np.diag(errors) == 0).all(), "it is always right when told the step's own words"
    assert errors.shape == (2, 2)
    assert errors.max() > 0, "told the other's words it does something else"
    alike = [replace(step, observation=replace(step.observation, instruction="lift the red cube")) for step in steps]
    assert score_offline(policy, offline(alike), Console(quiet=True))["datasets"]["toy"]["confusion"] is None


def test_so_many_steps_and_no_more(policy, steps):
    for wanted, sizes in {5: [3, 2], 6: [3, 3], 100: [3, 3, 2]}.items():
        batches, *_ = offline(steps, num_steps=wanted).open(image_size=32, normalisation="quantile")
        assert [len(batch) for batch in batches] == sizes
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        offline(steps, num_steps=0)


def test_one_dataset_of_a_mixture(policy, steps):
    mixed = [replace(step, dataset_name="other") if i % 2 else step for i, step in enumerate(steps)]
    assert score_offline(policy, offline(mixed, dataset="other"), Console(quiet=True))["steps"] == 4
    both = score_offline(policy, offline(mixed), Console(quiet=True))
    assert {name: scores["steps"] for name, scores in both["datasets"].items()} == {"toy": 4, "other": 4}
    with pytest.raises(ValueError, match="dataset 'third' is not held out here"):
        offline(mixed, dataset="third").check()


def test_a_dataset_that_the_policy_knows_is_acted_on_with_its_own_statistics(policy, steps, monkeypatch):
    mixed = [replace(step, dataset_name=("toy", "other", "new")[i % 3]) for i, step in enumerate(steps)]
    both = Policy(policy.vla, policy.processor, {"toy": STATISTICS, "other": STATISTICS}, "toy", device="cpu")
    asked, act_chunk = set(), both.act_chunk
    monkeypatch.setattr(both, "act_chunk", lambda seen, key: asked.add(key) or act_chunk(seen, key))
    score_offline(both, offline(mixed), Console(quiet=True))
    assert asked == {"toy", "other", None}


def test_an_offline_evaluation_leaves_results_and_a_report(policy, steps, tmp_path):
    found = evaluate(policy, offline(steps), tmp_path, label="mine", console=Console(quiet=True))
    assert Results.load(tmp_path) == found
    assert found.env == "offline"
    report = (tmp_path / "report.md").read_text()
    assert "| gripper | 100.0 % | 0.0000 |" in report
    assert "| lift the red cube | 4 | 100.0 % | 0.0000 |" in report
    assert "poor predictor of success" in report
    assert "does it listen?" in report
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


def test_calibration_tells_a_policy_that_knows_from_one_that_does_not():
    random = np.random.default_rng(0)
    entropy = random.random(5000)
    knows, ignorant = random.random(5000) > entropy, random.random(5000) > 0.5
    found = calibration(entropy, knows, 1.0 - knows)
    assert found["auroc"] == pytest.approx(5 / 6, abs=0.02)
    accuracies = [part["token_accuracy"] for part in found["bins"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert calibration(entropy, ignorant, 1.0 - ignorant)["auroc"] == pytest.approx(0.5, abs=0.02)
    assert calibration(np.ones(6), np.arange(6) > 2, np.zeros(6))["auroc"] == 0.5, "ties tell nothing"
    assert calibration(np.ones(3), np.ones(3, bool), np.zeros(3))["auroc"] is None


def test_the_same_checkpoint_twice_gives_the_same_episodes(policy, tmp_path):
    world = functools.partial(Tabletop, image_size=32, tidy=True, plates=[], max_episode_steps=8)
    chosen = {"tasks": ["lift_red_cube", "touch_red_cube"], "episodes_per_task": 3, "num_envs": 4, "save_videos": 9}
    once, twice = (
        evaluate(policy, world, tmp_path / str(workers), num_workers=workers, console=Console(quiet=True), **chosen)
        for workers in (1, 2)
    )
    assert once.episodes == twice.episodes
    for episode in once.episodes:  # to the last pixel of the last picture
        first, second = (tmp_path / workers / str(episode.video) for workers in "12")
        assert first.read_bytes() == second.read_bytes()
    (same,) = compare_all({"once": [once], "twice": [twice]})
    assert (same.pairs, same.difference, same.significant) == (6, 0.0, False)


def test_what_env_builds_says_how_it_is_evaluated() -> None:
    assert kind_of(offline([])) == "held_out"
    assert kind_of(functools.partial(TrainingSteps, list)) == "open_loop"
    assert kind_of(functools.partial(Tabletop, image_size=32)) == kind_of(Tabletop) == "rollouts"
    assert {kind_of(kind) for kind in (Offline, TrainingSteps, Replay, Tabletop)} == set(EVALUATIONS)
