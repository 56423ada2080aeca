"""Actions relative to the state at the start of their chunk: there and back, with statistics of their own."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_lerobot as toy
from tiny_parts import TOWERS, tiny_vla

from openvla_lightning.action_head import TokenHead
from openvla_lightning.actions import absolute
from openvla_lightning.data import VLADataModule
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.relative import state_columns
from openvla_lightning.data.source.formats import stored
from openvla_lightning.env.recorded import Offline, TrainingSteps
from openvla_lightning.evaluation.held_out import score_offline
from openvla_lightning.evaluation.open_loop import check_open_loop
from openvla_lightning.policy import Policy
from openvla_lightning.processor import Processor
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Observation

CHUNK = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("relative") / "toy").parent


def module(root: Path, **options) -> VLADataModule:
    told = {"actions": "delta_from_state", "gripper": {"open": -1, "closed": 1}} | options
    data = VLADataModule(
        partial(stored, root), {"toy": 1.0}, list, 32, 4, datasets={"toy": toy.described(**told)}, val_fraction=0,
        action_chunk=CHUNK, noop_filter="none", num_workers=0, proprio=True, chunk_end="mask",
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


def test_actions_come_back_as_they_were_recorded(root: Path) -> None:
    data = module(root)
    steps, index = data.train["toy"], data.sources["toy"].index
    statistics = DatasetStatistics.from_dict(data.statistics["toy"].to_dict())  # as a checkpoint holds it
    assert statistics.relative_to is not None
    assert statistics.relative_to.tolist() == [0, 1, 2, 3, 4, 5, -1]
    bounds = index.bounds
    differences = []
    for step in range(index.num_steps):
        last = int(bounds[index.trajectory[step] + 1]) - 1
        wanted = index.action[np.minimum(np.arange(step, step + CHUNK), last)]
        chunk = steps.actions(np.array([step]))[0]
        found = absolute(statistics.unnormalise(chunk), statistics.relative_to, index.proprio[step])
        relative = wanted[:, :6] - index.proprio[step, :6]
        inside = np.all((relative >= statistics.action["q01"][:6]) & (relative <= statistics.action["q99"][:6]), axis=1)
        np.testing.assert_allclose(found[inside, :6], wanted[inside, :6], atol=1e-6)
        np.testing.assert_array_equal(found[:, 6], wanted[:, 6])
        differences.append(relative[: last - step + 1])
    every = np.concatenate(differences)
    np.testing.assert_allclose(statistics.action["max"][:6], every.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.action["q01"][:6], np.quantile(every, 0.01, axis=0), rtol=1e-5)
    assert statistics.num_transitions == index.num_steps
    with pytest.raises(ValueError, match="an observation needs its proprio"):
        absolute(np.zeros((CHUNK, 7)), statistics.relative_to, None)
    with pytest.raises(ValueError, match="relative to the state"):
        statistics.merge(statistics)


def test_which_states_are_meant() -> None:
    def columns(states: int, **options) -> list[int] | None:
        spec = describe("x", {"cameras": {"primary": None}, "actions": "delta_from_state"} | options)
        found = state_columns(spec, 7, states)
        return None if found is None else found.tolist()

    assert columns(7, actions="recorded") is None
    assert columns(7) == [0, 1, 2, 3, 4, 5, -1]
    assert columns(9, relative_to=[8, None, 7, 0, 1, 2, 3]) == [8, -1, 7, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="needs state 5, and `state` holds 3 numbers"):
        columns(3)
    with pytest.raises(ValueError, match="`relative_to` has 2 entries, its actions have 7"):
        columns(9, relative_to=[0, 1])
    with pytest.raises(ValueError, match="choose recorded or delta_from_state"):
        columns(9, actions="delta")


@pytest.fixture(scope="module")
def policy(root: Path) -> Policy:
    """Has learnt nothing, reads no state, and predicts differences from it."""
    processor = Processor(TokenHead(vocab_size=768, action_chunk=CHUNK), tokenizer="tiny", image_size=32, towers=TOWERS)
    return Policy(tiny_vla(), processor, {"toy": module(root).statistics["toy"]}, device="cpu")


def recorded(root: Path) -> dict[str, Any]:
    told = {"actions": "delta_from_state", "gripper": {"open": -1, "closed": 1}}
    return {
        "source": partial(stored, root),
        "mix": {"toy": 1.0},
        "global_batch_size": 4,
        "datasets": {"toy": toy.described(**told)},
        "val_fraction": 0.5,
        "noop_filter": "none",
        "num_workers": 0,
    }


def test_the_error_of_executed_actions_is_of_what_the_robot_is_told(root: Path, policy: Policy) -> None:
    env = Offline(partial(VLADataModule, **recorded(root)))
    scores = score_offline(policy, env)["datasets"]["toy"]["dimensions"]
    data = VLADataModule(**recorded(root), collate=list, **policy.reads)
    data.prepare_data()
    data.setup()
    steps = [step for batch in data.val_dataloader() for step in batch]
    index = data.sources["toy"].index
    assert len(steps) == len(data.val["toy"])
    errors = []
    for step in steps:
        acted = policy.act_chunk([step.observation])[0, 0]
        statistics = policy.statistics
        demonstrated = absolute(statistics.unnormalise(step.action), statistics.relative_to, step.observation.proprio)
        errors.append(np.abs(acted - demonstrated[0]))
    assert index.proprio.shape[1] >= 6
    expected = np.mean(errors, axis=0)
    np.testing.assert_allclose([of["l1_executed"] for of in scores.values()], expected, rtol=1e-4, atol=1e-6)


def test_acting_agrees_with_training(root: Path, policy: Policy, tmp_path: Path) -> None:
    env = TrainingSteps(partial(VLADataModule, **recorded(root)), num_steps=8)
    check_open_loop(policy, env, tmp_path)
    assert "NO" not in (tmp_path / "open_loop.md").read_text()


def test_a_world_without_the_state_is_refused_by_name(policy: Policy) -> None:
    seen = Observation({"primary": np.zeros((32, 32, 3), np.uint8)}, "lift the cup")
    with pytest.raises(ValueError, match="relative to the robot's state: an observation needs its proprio"):
        policy.check(seen)
    with pytest.raises(ValueError, match=r"expected \d+ proprio dimensions in the last axis, got shape \[40\]"):
        policy.check(replace(seen, proprio=np.zeros(40, np.float32)))
