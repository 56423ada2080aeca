"""The data report, on a dataset with planted faults; every number is counted again from what was written."""

import re
import shutil
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import faulty_rlds
import numpy as np
import pytest
from faulty_rlds import GRIPPER, TRAIN, VAL, X, Z, chosen

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.report.facts import Facts, gather, selections
from openvla_lightning.data.report.motion import Duplicates, measure_idle, movement
from openvla_lightning.data.report.pages import section
from openvla_lightning.data.report.pictures import draw_lengths
from openvla_lightning.data.report.verdict import remarks, verdict
from openvla_lightning.data.source.synthetic import Synthetic


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the faulty dataset."""
    root = tmp_path_factory.mktemp("faulty")
    faulty_rlds.write(root / "faulty" / "1.0.0")
    return root


@pytest.fixture(scope="module")
def written() -> dict[str, list[list[dict[str, Any]]]]:
    """split -> trajectories -> steps, as they were written."""
    return {
        split: [faulty_rlds.episode(split, i)["steps"] for i in range(count)]
        for split, count in {"train": TRAIN, "val": VAL}.items()
    }


@pytest.fixture(scope="module")
def facts(root: Path) -> Facts:
    """Of the faulty dataset, no-ops left out."""
    return gather(chosen(root))


def stands_still(step: dict[str, Any]) -> bool:
    return not step["action"][:6].any()


def test_counts(facts: Facts, written: dict[str, list[list[dict[str, Any]]]]) -> None:
    assert facts.splits == {split: (len(t), sum(map(len, t))) for split, t in written.items()}
    assert facts.lengths.tolist() == [len(t) for split in written.values() for t in split]
    spoken = [t for t in written["train"] if t[0]["language_instruction"]]
    assert facts.filters.kept == sum(not stands_still(step) for t in spoken for step in t)
    assert facts.words.trajectories == pytest.approx((len(spoken) + VAL) / (TRAIN + VAL))
    assert facts.held_out == sum(not stands_still(step) for t in written["val"] for step in t)


def test_idle_stretches(facts: Facts, written: dict[str, list[list[dict[str, Any]]]]) -> None:
    trajectories = [t for split in written.values() for t in split]
    runs = [len(list(run)) for t in trajectories for idle, run in groupby(t, stands_still) if idle]
    assert facts.idle.runs.tolist() == runs
    assert set(runs) == {12}
    assert facts.idle.share == pytest.approx(sum(runs) / sum(map(len, trajectories)))
    assert facts.idle.first == pytest.approx(np.mean([stands_still(t[0]) for t in trajectories]))
    assert facts.idle.last == 0
    assert facts.idle.trained == 0
    assert facts.idle.threshold == 1e-3


def test_runs_end_with_their_trajectory() -> None:
    source = Synthetic("any")
    source.index.action[:] = 0
    idle = measure_idle(source.index, source.spec, source.statistics, np.arange(source.index.num_steps))
    assert idle.runs.tolist() == np.diff(source.index.bounds).tolist()


def test_dimensions(facts: Facts, written: dict[str, list[list[dict[str, Any]]]]) -> None:
    every = np.array([s["action"] for split in written.values() for t in split for s in t])
    low, high = np.quantile(every, [0.01, 0.99], axis=0).astype(np.float32)
    spoken = [t for t in written["train"] if t[0]["language_instruction"]]
    trained = np.array([s["action"] for t in spoken for s in t if not stands_still(s)])
    outside = (trained < low) | (trained > high)
    assert [d.name for d in facts.dimensions] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    for d, dimension in enumerate(facts.dimensions):
        assert (dimension.low, dimension.high) == (every[:, d].min(), every[:, d].max())
        assert dimension.outside == pytest.approx(outside[:, d].mean())
        assert dimension.counts.sum() == len(trained)
        inner = slice(1, -1)
        again, _ = np.histogram(trained[:, d], dimension.edges)
        np.testing.assert_array_equal(dimension.counts[inner], again[inner])
    assert facts.clipped == pytest.approx(outside[:, :6].any(axis=1).mean())
    x, gripper = facts.dimensions[X], facts.dimensions[GRIPPER]
    assert x.at_bounds == pytest.approx(np.mean(np.abs(trained[:, X]) == 0.5))
    assert gripper.binary == pytest.approx(np.isin(trained[:, GRIPPER], (0, 1)).mean())
    assert facts.dimensions[Z].reach == pytest.approx((400 - high[Z]) / (high[Z] - low[Z]), rel=1e-5)


def test_words_and_copies(facts: Facts, written: dict[str, list[list[dict[str, Any]]]]) -> None:
    told = [t[0]["language_instruction"] for split in written.values() for t in split]
    assert facts.words.distinct == len(set(told) - {""})
    assert facts.words.distinct_loosely == len({words.lower() for words in told} - {""})
    for words, trajectories, steps in facts.words.frequent:
        assert trajectories == told.count(words)
        assert steps == sum(
            len(t) for split in written.values() for t in split if t[0]["language_instruction"] == words
        )
    spoken = sum(bool(t[0]["language_instruction"]) for t in written["train"])
    assert facts.duplicates == Duplicates(trained=spoken, copies=2, held_out=VAL, leaked=VAL)


def test_cameras(facts: Facts, written: dict[str, list[list[dict[str, Any]]]]) -> None:
    primary, wrist = facts.cameras
    assert primary.missing == 0
    assert (primary.sizes, wrist.sizes) == ({(32, 32): 8}, {(16, 32): 8})
    blind = sum(
        isinstance(step["observation"]["wrist"], bytes) for split in written.values() for t in split for step in t
    )
    assert wrist.missing == pytest.approx(blind / facts.steps)


def test_every_planted_fault_is_in_the_verdict(facts: Facts, root: Path) -> None:
    found = "\n".join(remarks(facts))
    for pattern in (
        r"never changing.*: roll$",
        r"hardly ever changing: pitch \(9\d\.\d% are 0\)",
        r"saturated.*: x [3-7]\d%$",
        r"outliers.*: z [5-9]\d",
        r"neither normalised nor binary.*: gripper 7\d%",
        r"outside of -1\.\.1.*: gripper 0\.\.2$",
        r"7% of the trajectories have no words",
        r"2 of 37 trajectories repeat",
        r"4 of 4 held-out trajectories are also trained on",
        r"no wrist image",
    ):
        assert re.search(pattern, found, re.M), f"{pattern} is not in\n{found}"
    assert "stand still" not in found
    (roll,) = re.findall(r"^\| roll \|(.*)\|$", "\n".join(section(facts)), re.M)
    assert roll.split(" | ")[6:8] == ["-", "-"], "what never changes is never at -1 or 1"
    unfiltered = gather(chosen(root, filter_noops=False))
    assert "data.noop_filter=near_zero leaves them out" in verdict(unfiltered)
    assert unfiltered.idle.trained > 0.1
    nameless = chosen(root, filter_noops=False, spec={"noop_threshold": None})
    assert "noop_threshold" in verdict(gather(nameless))


def test_a_sound_dataset_is_ready_and_a_small_one_is_tiny(tmp_path: Path) -> None:
    for steps, expected in ((4096, "ready"), (64, "tiny: 4 trajectories, 64 steps to train on")):
        datamodule = VLADataModule(
            lambda name, spec, steps=steps: Sound(name, spec, steps), {"bridge_orig": 1.0}, list, 32, 8
        )
        datamodule.setup()
        facts = gather(selections(datamodule)[0])
        assert verdict(facts) == expected
        assert not len(facts.idle.runs)
        assert draw_lengths(facts, tmp_path / "lengths.png").exists()


class Sound(Synthetic):
    """Random actions that are spread as a robot's are."""

    @property
    def index(self) -> Any:
        index = super().index
        index.images["primary"][:, 2] = index.images["secondary"][:, 2] = index.images["wrist"][:, 2] = 1
        index.action[:, :6] = np.random.default_rng(0).normal(size=(index.num_steps, 6))
        return index


def test_what_could_not_be_read_is_in_the_verdict(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    shard = max(tmp_path.glob("faulty/1.0.0/*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    found = gather(chosen(tmp_path, reader={"bad_trajectories": "skip"}))
    assert found.splits["train"][0] == TRAIN - 1
    assert [one["file"] for one in found.skipped] == [shard.name]
    assert verdict(found).startswith("trajectories left out, as they could not be read: 1")


def test_what_could_not_be_read_is_listed(facts: Facts) -> None:
    skipped = tuple({"file": "a.tfrecord", "trajectory": i, "reason": f"action {i} is NaN | <inf>"} for i in range(30))
    damaged = replace(facts, skipped=skipped)
    assert verdict(damaged).startswith("trajectories left out, as they could not be read: 30")
    text = "\n".join(section(damaged))
    assert "| a.tfrecord | 19 | action 19 is NaN \\| \\<inf\\> |" in text
    assert "a.tfrecord | 20" not in text
    assert "And 10 more" in text
    assert "could not be read" not in "\n".join(section(facts))


def test_how_far_an_action_goes_is_a_change_or_the_difference_of_positions() -> None:
    actions = np.array([[0.0, 5.0, 1.0], [3.0, 9.0, 0.0], [0.0, 9.0, 0.0]], np.float32)
    std = np.array([1.0, 1.0, 0.0])
    changes = movement(actions, np.array([False, False, True]), std)
    np.testing.assert_allclose(changes, np.hypot([0, 3, 0], [5, 9, 9]))
    np.testing.assert_allclose(movement(actions, np.array([True, True, True]), std), [0, 5, 3])
