"""What is served: splits, filters, chunks."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import toy_rlds
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.data.oxe import DatasetSpec, describe
from openvla_lightning.data.oxe.registry import join_action
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.data.steps import DatasetSteps, noops, select, split_trajectories

SPEC = DatasetSpec("toy", partial(join_action, paths=("action",)), {"primary": None}, noop_threshold=0.5)


def index_of(trajectories: list[list[tuple[float, float]]], words: list[str] | None = None, **changes) -> Index:
    """An index of 2-dim actions, one change and one gripper."""
    lengths = [len(t) for t in trajectories]
    words = words or ["go"] * len(trajectories)
    return Index(
        action=np.array([step for t in trajectories for step in t], np.float32).reshape(-1, 2),
        proprio=np.zeros((sum(lengths), 0), np.float32),
        bounds=np.cumsum([0, *lengths]),
        split=changes.pop("split", np.zeros(len(trajectories), np.int16)),
        instruction=np.repeat(np.arange(len(trajectories), dtype=np.int32), lengths),
        images={},
        splits=changes.pop("splits", ("train",)),
        instructions=tuple(words),
    )


@given(st.lists(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), max_size=8), max_size=4))
def test_noops_obey_their_definition(trajectories: list[list[tuple[float, float]]]) -> None:
    expected = []
    for trajectory in trajectories:
        kept = None
        for move, gripper in trajectory:
            idle = move < 0.5 and (kept is None or gripper == kept)
            expected.append(idle)
            kept = kept if idle else gripper
    assert noops(index_of(trajectories), SPEC).tolist() == expected


def test_the_filter_removes_the_known_stretches_and_says_so(toy_root: Path) -> None:
    source = RLDS(toy_root, "toy", describe("toy", toy_rlds.SPEC))
    for split, count, silent in (("train", toy_rlds.TRAIN, 1), ("val", toy_rlds.VAL, 0)):
        kept, report = select(source, split, val_fraction=0.5, filter_noops=True)
        everything, unfiltered = select(source, split, val_fraction=0.5, filter_noops=False)
        assert report.trajectories == count
        assert report.unlabelled == silent
        assert report.noops == 2 * (count - silent)
        assert report.kept == len(kept) == len(everything) - report.noops
        assert unfiltered.noops == 0
        moved = np.linalg.norm(source.index.action[kept, :6], axis=1)
        assert moved.min() > 0.01
        words = [source.index.instructions[i] for i in source.index.instruction[kept]]
        assert all(words)
    assert report.to_dict()["kept"] == len(kept)


def test_without_a_threshold_nothing_is_filtered() -> None:
    spec = DatasetSpec("toy", SPEC.transform, {})
    assert not noops(index_of([[(0.0, 0.0)] * 3]), spec).any()


def test_validation_is_val_where_there_is_one_else_the_end_of_train() -> None:
    index = index_of([[(1, 0)]] * 5, split=np.array([0, 1, 0, 2, 0], np.int16), splits=("train", "val", "test"))
    assert np.flatnonzero(split_trajectories(index, "train", 0.9, "toy")).tolist() == [0, 2, 4]
    assert np.flatnonzero(split_trajectories(index, "val", 0.9, "toy")).tolist() == [1]
    index = index_of([[(1, 0)]] * 20)
    assert np.flatnonzero(split_trajectories(index, "val", 0.05, "toy")).tolist() == [19]
    assert split_trajectories(index, "train", 0.05, "toy").sum() == 19
    assert split_trajectories(index, "train", 0.0, "toy").all()
    with pytest.raises(ValueError, match="no split is called 'train'; there are test"):
        split_trajectories(index_of([[(1, 0)]], splits=("test",)), "train", 0.05, "toy")


def test_chunks_as_released(golden: Path) -> None:
    arrays = np.load(golden / "data" / "transforms" / "golden_units_A.npz")
    checked = 0
    for number in sorted({key.split("/")[1] for key in arrays.files if key.startswith("chunk/")}):
        case = {key.split("/")[-1]: arrays[key] for key in arrays.files if key.startswith(f"chunk/{number}/")}
        _, window, future = case["T_window_future"]
        if window != 1 or "goal_timestep" in case or bytes(case["flavour"]) != b"openvla":
            continue
        before = np.ones((2, 7), np.float32)  # another trajectory on each side
        source = Synthetic("toy")
        source.index = Index(
            action=np.concatenate([before, case["action_in"], before]),
            proprio=np.zeros((len(case["action_in"]) + 4, 0), np.float32),
            bounds=np.cumsum([0, 2, len(case["action_in"]), 2]),
            split=np.zeros(3, np.int16),
            instruction=np.zeros(len(case["action_in"]) + 4, np.int32),
            images={},
            splits=("train",),
            instructions=("go",),
        )
        source.statistics = Unscaled()
        steps = DatasetSteps(source, np.arange(source.index.num_steps, dtype=np.int32), "quantile", int(future) + 1)
        ours = steps.actions(np.arange(2, 2 + len(case["action_in"])))
        np.testing.assert_array_equal(ours, case["action_out"])
        checked += 1
    assert checked >= 2


class Unscaled:
    """Statistics that leave actions alone."""

    def normalise(self, action: np.ndarray, method: str) -> np.ndarray:
        return action
