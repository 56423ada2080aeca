"""Which steps are served."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import toy_rlds
from golden_sets import one
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning.data import filters
from openvla_lightning.data.filters import noops, select, split_trajectories
from openvla_lightning.data.oxe import DatasetSpec, describe
from openvla_lightning.data.oxe.registry import join_action
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.statistics import DatasetStatistics

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
        kept, report = select(source, split, val_fraction=0.5, noop_filter="near_zero")
        everything, unfiltered = select(source, split, val_fraction=0.5, noop_filter="none")
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


def test_filters_leave_out_more_and_more_and_count_it(toy_root: Path) -> None:
    spec = describe("toy", toy_rlds.SPEC | {"drop_first": True})
    source = RLDS(toy_root, "toy", spec)
    kept = {}
    for mode in ("none", "released", "first_step", "near_zero"):
        kept[mode], report = select(source, "train", val_fraction=0, noop_filter=mode)
        left_out = report.first_steps + report.zero_actions + report.noops
        assert report.kept + left_out == len(kept["none"])
    starts = set(source.index.bounds[:-1].tolist())
    assert set(kept["none"]) - set(kept["released"]) == starts & set(kept["none"].tolist())
    assert kept["first_step"].tolist() == kept["released"].tolist()
    assert set(kept["near_zero"]) < set(kept["released"])
    plain = RLDS(toy_root, "toy", describe("toy", toy_rlds.SPEC))
    assert select(plain, "train", val_fraction=0, noop_filter="released")[1].first_steps == 0
    assert select(plain, "train", val_fraction=0, noop_filter="first_step")[1].first_steps == toy_rlds.TRAIN - 1
    with pytest.raises(ValueError, match=r"noop_filter=some: choose none, released, first_step, near_zero"):
        select(plain, "train", val_fraction=0, noop_filter="some")


def test_a_selection_is_made_once_and_kept_beside_the_index(toy_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RLDS(toy_root, "toy", describe("toy", toy_rlds.SPEC))
    first = select(source, "train", val_fraction=0.25, noop_filter="near_zero")
    monkeypatch.setattr(filters, "labelled", lambda index: pytest.fail("worked out again"))
    again = select(source, "train", val_fraction=0.25, noop_filter="near_zero")
    np.testing.assert_array_equal(again[0], first[0])
    assert again[1] == first[1]


def test_a_dataset_in_a_folder_of_somebody_else_s_is_selected_from_too(
    toy_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RLDS(toy_root, "toy", describe("toy", toy_rlds.SPEC))
    folder = source.index.folder
    assert folder is not None
    before = sorted(folder.iterdir())
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a file mode would not stop a superuser
    steps, report = select(source, "train", val_fraction=0.37, noop_filter="near_zero")
    assert 0 < len(steps) == report.kept
    assert sorted(folder.iterdir()) == before


@given(st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, max_size=12))
def test_in_pieces_as_in_one(piece: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(len(lengths))
    index = index_of([[(float(m), float(g)) for m, g in rng.integers(0, 2, (n, 2))] for n in lengths])
    source = Synthetic("toy")
    source.spec, source.index = SPEC, index
    whole = select(source, "train", val_fraction=0, noop_filter="near_zero")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "PIECE", piece)
        again = select(source, "train", val_fraction=0, noop_filter="near_zero")
    assert again[0].tolist() == whole[0].tolist()
    assert again[1] == whole[1]


def test_droid_s_filter_as_released(each_golden: Path) -> None:
    arrays = np.load(one(each_golden / "data" / "transforms", "golden_units_*.npz"))
    raw, keep = arrays["droid_zero_filter/raw6"], arrays["droid_zero_filter/keep"].astype(bool)
    source = Synthetic("droid", DatasetSpec("droid", SPEC.transform, {}, zero_filter=True))
    action = np.concatenate([raw, np.ones((len(raw), 1))], axis=1).astype(np.float32)
    source.index = Index(
        action=action,
        proprio=np.zeros((len(raw), 0), np.float32),
        bounds=np.array([0, len(raw)]),
        split=np.zeros(1, np.int16),
        instruction=np.zeros(len(raw), np.int32),
        images={},
        splits=("train",),
        instructions=("go",),
    )
    q01, q99 = (np.append(arrays[f"droid_zero_filter/{name}"], [g]) for name, g in (("q01", 0), ("q99", 1)))
    mask = np.array([True] * 6 + [False])
    bounds = {"q01": q01, "q99": q99, "min": q01, "max": q99, "mean": q01, "std": q99, "mask": mask}
    source.statistics = DatasetStatistics(bounds, {})
    kept, report = select(source, "train", val_fraction=0, noop_filter="released")
    assert kept.tolist() == np.flatnonzero(keep).tolist()
    assert report.zero_actions == (~keep).sum() > 0


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
