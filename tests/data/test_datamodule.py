"""From files to batches: the same batches every time, whatever serves them, also after a restart."""

import logging
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import resumable
import torch
import toy_rlds
from serving import opened, random_data, same, toy, train

from openvla_lightning.data import MissingDataError, VLADataModule
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.data.steps import DatasetSteps, felt_columns

AUGMENT = {"random_brightness": [0.2], "random_hue": [0.05]}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def test_steps_arrive_whole(toy_root: Path) -> None:
    data = opened(toy(toy_root, cameras=["primary", "wrist", "secondary"], image_size=24))
    steps = [step for batch in data.train_dataloader() for step in batch]
    statistics = data.statistics["toy"]
    meant = [
        (
            step["language_instruction"],
            statistics.normalise(step["action"]).tolist(),
            step["observation"]["image"][0, 0],
        )
        for number in range(toy_rlds.TRAIN)
        for step in toy_rlds.episode("train", number)["steps"]
    ]
    for step in steps:
        assert step.action.shape == (1, 7)
        assert {role: image.shape for role, image in step.observation.images.items()} == dict.fromkeys(
            ("primary", "wrist", "secondary"), (24, 24, 3)
        )
        assert not step.observation.images["secondary"].any()
        shade = step.observation.images["primary"][12, 12].astype(int)
        assert any(
            words == step.observation.instruction
            and action == step.action[0].tolist()
            and np.abs(pixel - shade).max() <= 2
            for words, action, pixel in meant
        )
    report = data.filter_report["toy"]
    assert len(steps) == report.kept - report.kept % 4
    assert len({step.action.tobytes() for step in steps}) == len(steps)


def test_a_worker_that_is_not_forked_maps_the_same_files(toy_root: Path) -> None:
    batches = opened(toy(toy_root)).train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(batches))
    assert isinstance(copy.datasets[0].steps.base, np.memmap)
    numbers = list(range(9))
    assert same([copy[numbers]], [batches[numbers]])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(toy_root: Path, workers: int) -> None:
    alone = list(opened(toy(toy_root)).train_dataloader())
    together = list(opened(toy(toy_root, num_workers=workers)).train_dataloader())
    assert same(alone, together)
    assert not same(alone, list(opened(toy(toy_root, seed=8)).train_dataloader()))


def test_images_are_augmented_in_training_alone_and_by_their_number(toy_root: Path) -> None:
    data = opened(toy(toy_root, collate=resumable.collate, augment=AUGMENT))
    batch = next(iter(data.train_dataloader()))
    for stage in ("validating", "testing", "predicting"):
        data.trainer = SimpleNamespace(training=False, **{stage: True})
        assert data.on_after_batch_transfer(batch, 0) is batch
    data.trainer = SimpleNamespace(training=True)
    augmented = data.on_after_batch_transfer(batch, 0)
    assert augmented.pixel_values.dtype == torch.uint8
    assert (augmented.pixel_values != batch.pixel_values).any()
    picked = replace(batch, pixel_values=batch.pixel_values[[2]], numbers=[batch.numbers[2]])
    assert torch.equal(data.on_after_batch_transfer(picked, 0).pixel_values[0], augmented.pixel_values[2])


def test_validation_is_every_held_out_step_once_unaugmented(toy_root: Path) -> None:
    data = opened(toy(toy_root, global_batch_size=5))
    steps = [step for batch in data.val_dataloader() for step in batch]
    expected = sum(5 + number % 5 - 2 for number in range(toy_rlds.VAL))
    assert len(steps) == len({step.action.tobytes() for step in steps}) == expected
    assert same(list(data.val_dataloader()), list(opened(toy(toy_root, global_batch_size=5)).val_dataloader()))
    limited = opened(toy(toy_root, global_batch_size=5, limit_val_samples=7)).val_dataloader()
    assert sum(map(len, limited)) == 7
    assert not list(opened(random_data(mix={"kuka": 1.0}, val_fraction=0.0)).val_dataloader())[8:]


@pytest.mark.parametrize("normalisation", ["quantile", "minmax", "meanstd"])
def test_actions_are_normalised_by_the_datasets_own_statistics(toy_root: Path, normalisation) -> None:
    data = opened(toy(toy_root, normalisation=normalisation, filter_noops=False))
    raw = [s["action"] for n in range(toy_rlds.TRAIN) for s in toy_rlds.episode("train", n)["steps"]]
    for batch in data.train_dataloader():
        for step in batch:
            back = data.statistics["toy"].unnormalise(step.action[0], normalisation)
            inside = (np.abs(step.action[0]) < 0.999) & ([True] * 6 + [False])  # the gripper never moves: 0
            assert min(np.abs(back - action)[inside].max(initial=0) for action in raw) < 1e-4


@pytest.mark.parametrize(("stop", "workers"), [(1, 2), (7, 0), (11, 1), (12, 0), (13, 0), (25, 0)])
def test_training_resumes_at_the_very_next_batch(tmp_path: Path, stop: int, workers: int) -> None:
    whole = train(30, tmp_path / "whole.ckpt")
    assert {len(batch) for batch in whole} == {8}
    first = train(stop, tmp_path / "part.ckpt", num_workers=workers)
    rest = train(30, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt", num_workers=workers)
    assert first + rest == whole


def test_resuming_with_accumulation_and_after_an_accumulated_step(tmp_path: Path) -> None:
    whole = train(12, tmp_path / "whole.ckpt", accumulate=2)
    assert {len(batch) for batch in whole} == {4}
    first = train(5, tmp_path / "part.ckpt", accumulate=2)
    assert first + train(12, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt", accumulate=2) == whole


def test_overfitting_sees_one_batch_over_and_over(tmp_path: Path) -> None:
    seen = train(5, tmp_path / "x.ckpt", overfit_batches=1)
    assert len(seen) == 5
    assert all(batch == seen[0] for batch in seen)
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["VLADataModule"]["samples_served"] == 0


def test_another_seed_after_resuming_is_said(caplog: pytest.LogCaptureFixture) -> None:
    state = random_data().state_dict()
    with caplog.at_level(logging.WARNING):
        random_data(seed=8, mix={"kuka": 1.0}).load_state_dict(state)
        random_data(window_gb=2.0, noop_filter="none").load_state_dict(state)
    assert "data.seed and data.mix changed" in caplog.text
    assert "data.noop_filter and data.window_gb changed" in caplog.text
    changes = [random_data(curriculum=[{"after": 5, "mix": {"kuka": weight}}]) for weight in (0.5, 0.25)]
    with caplog.at_level(logging.WARNING):
        changes[1].load_state_dict(changes[0].state_dict())
    assert "data.curriculum.mix changed" in caplog.text


def test_served_shares_follow_weight_times_size(toy_root: Path) -> None:
    data = opened(random_data(mix={"kuka": 1.0, "bridge_orig": 3.0}, global_batch_size=16))
    names = [step.dataset_name for batch in data.train_dataloader() for step in batch]
    assert names.count("bridge_orig") / len(names) == pytest.approx(0.75, abs=0.1)
    # one pass over the dataset of weight 1, as released
    assert data.epoch_samples == 64 * 4


def test_missing_data_is_one_error_in_milliseconds(tmp_path: Path) -> None:
    mix = {"bridge_orig": 1.0, "libero_10_no_noops": 1.0, "tabletop_pretrain": 1.0}
    data = VLADataModule(partial(RLDS, tmp_path), mix, list, 224, 16)
    assert data.missing() == list(mix)
    with pytest.raises(MissingDataError) as error:
        data.check()
    for words in (
        *mix,
        "OPENVLA_LIGHTNING_DATA",
        "rail.eecs.berkeley.edu",
        "python -m openvla_lightning.demonstrations",
    ):
        assert words in str(error.value)
    with pytest.raises(MissingDataError):
        data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"bridge_orgi": 1.0}}, "did you mean 'bridge_orig'"),
        ({"mix": {"kuka": 0.0}}, "mixture is empty"),
        ({"curriculum": [{"after": 5, "mix": {"kukka": 1.0}}]}, "did you mean 'kuka'"),
        ({"mix": {"kuka": 1.0, "roboset": 1.0}}, "different action encodings: eef_pos: kuka; joint_pos: roboset"),
        ({"noop_filter": "zero"}, "choose none, released, first_step, near_zero"),
        ({"statistics": "own"}, "choose released, train"),
        ({"images": "quick"}, "choose released, fast"),
        ({"window_gb": 0}, "window_gb=0"),
        ({"window_gb": float("nan")}, "window_gb=nan"),
        ({"num_workers": -1}, "data.num_workers=-1: must be at least 0"),
        ({"limit_val_samples": -1}, "data.limit_val_samples=-1: a number of samples, or null for all"),
        ({"normalisation": "quantiles"}, "choose quantile, minmax, meanstd"),
        ({"val_fraction": 1.0}, "share of the trajectories"),
        ({"global_batch_size": 0}, "must be at least 1"),
        ({"action_chunk": 0}, "action_chunk=0"),
        ({"augment": {"random_blur": [1]}}, "unknown operation 'random_blur'"),
        ({"datasets": {"mine": {"camera": 1}}}, "unknown camera"),
    ],
)
def test_wrong_arguments_are_errors_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_data(**options)


def test_cameras_and_dimensions_that_do_not_fit(toy_root: Path) -> None:
    with pytest.raises(ValueError, match="toy has no camera left; it has primary, wrist"):
        toy(toy_root, cameras=["left"]).check()

    def mixed(name: str, spec: Any) -> Synthetic:
        return Synthetic(name, action_dim=7 if name == "kuka" else 14)

    data = VLADataModule(mixed, {"kuka": 1.0, "bridge_orig": 1.0}, list, 16, 8)
    with pytest.raises(ValueError, match=r"different dimensions: \{'kuka': 7, 'bridge_orig': 14\}"):
        data.setup()


def test_proprioception_comes_without_blanks() -> None:
    """A key that a dataset lacks is a column of zeros in the released statistics, and nothing that a model is told."""
    source = Synthetic("toy", num_steps=64, proprio_dim=5)
    source.spec = replace(source.spec, state=("pose", None, "gripper"))
    source.index.proprio[:, 3] = 0
    columns = felt_columns(source)
    assert columns.tolist() == [0, 1, 2, 4]
    felt = source.statistics.felt(columns)
    assert len(felt.proprio["q01"]) == 4
    steps = DatasetSteps(source, np.arange(64, dtype=np.int32), felt, "quantile", 1, felt=columns)
    np.testing.assert_array_equal(steps.proprio(3), source.index.proprio[3, columns])
    assert steps.normalised(steps.proprio(3)).shape == (4,)
    source.spec = replace(source.spec, state=("pose", "gripper"))
    assert felt_columns(source).tolist() == list(range(5))


ENDS = """
import gc, torch.utils.data
from openvla_lightning.data.loader import Loader
from openvla_lightning.data.source.processes import begin_loading
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1
iterator = iter(Loader(list(range(9)), num_workers=1, persistent_workers=True, worker_init_fn=begin_loading))
next(iterator)
{then}
raise SystemExit(7)
"""
GARBAGE = "iterator.itself = iterator; del iterator; gc.collect()  # closes its queues before it is told"


@pytest.mark.parametrize("then", ["", GARBAGE], ids=["kept", "garbage"])
def test_a_process_ends_whatever_an_error_did_to_its_workers(then: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ENDS.format(then=then)]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 7
