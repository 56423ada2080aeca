"""Our reader against the lerobot library's own, on datasets that the library wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from lerobot_golden import FOLDER, Reference, copied, described, every_dataset, opened

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.lerobot import LeRobot
from openvla_lightning.data.steps import DatasetSteps

pytestmark = pytest.mark.golden


def block_means(image: np.ndarray) -> np.ndarray:
    """Mean colours [4, 4, 3] of the inner halves of a grid of blocks, as the references hold them."""
    height, width = image.shape[0] // 4, image.shape[1] // 4
    blocks = image.astype(np.float64).reshape(4, height, 4, width, 3)
    return blocks[:, height // 4 : height - height // 4, :, width // 4 : width - width // 4].mean(axis=(1, 3))


@every_dataset
def test_rows_are_the_library_s(dataset: Path, tmp_path: Path) -> None:
    source, reference = opened(dataset, tmp_path)
    index = source.index
    np.testing.assert_array_equal(index.action, reference["col/action"])
    np.testing.assert_array_equal(index.proprio, reference["col/observation.state"])
    assert [index.instructions[i] for i in index.instruction] == reference.about["tasks"]
    assert index.bounds[:-1].tolist() == reference.about["first_index"]
    assert source.spec.control_hz == reference.about["fps"]
    np.testing.assert_allclose(source.statistics.action["mean"], reference["col/action"].mean(axis=0), atol=1e-5)
    np.testing.assert_array_equal(source.statistics.action["max"], reference["col/action"].max(axis=0))
    quantiles = np.quantile(reference["col/action"], [0.01, 0.99], axis=0)
    np.testing.assert_allclose([source.statistics.action[q] for q in ("q01", "q99")], quantiles, rtol=1e-6)


@every_dataset
def test_frames_are_the_library_s(dataset: Path, tmp_path: Path) -> None:
    source, reference = opened(dataset, tmp_path)
    steps = np.random.default_rng(0).permutation(source.index.num_steps).tolist()
    for role, key in reference.cameras.items():
        for image, step in zip(reference[f"full/{key}"], reference["full_index"].tolist(), strict=True):
            found = source.pixels(role, step)
            assert found is not None
            assert found.shape == image.shape
            assert np.abs(found.astype(int) - image).mean() <= 2  # bit-equal where FFmpeg is the same
        means = reference[f"block_means/{key}"]
        for step in steps:
            found = source.pixels(role, step)
            assert found is not None
            assert np.abs(block_means(found) - means[step]).max() < 1, source.where(step)
        in_runs = dict(source.run(role, steps))
        assert sorted(in_runs) == list(range(len(means)))
        assert max(np.abs(block_means(image) - means[step]).max() for step, image in in_runs.items()) < 1


@every_dataset
def test_a_history_at_the_edges_of_episodes_is_the_library_s(dataset: Path, tmp_path: Path) -> None:
    source, reference = opened(dataset, tmp_path)
    offsets, bounds = reference["imghist/offsets"].tolist(), source.index.bounds
    for role, key in reference.cameras.items():
        if f"imghist/{key}" not in reference.arrays:
            continue
        for row, step in enumerate(reference["imghist/index"].tolist()):
            trajectory = source.index.trajectory[step]
            first, last = bounds[trajectory], bounds[trajectory + 1] - 1
            for column, offset in enumerate(offsets):
                found = source.pixels(role, int(np.clip(step + offset, first, last)))
                assert found is not None
                assert np.abs(found.astype(int) - reference[f"imghist/{key}"][row, column]).mean() <= 2


@every_dataset
def test_stored_statistics_are_remarked_on_where_they_are_wrong(dataset: Path, tmp_path: Path) -> None:
    source, reference = opened(dataset, tmp_path)
    stored = json.loads((dataset.parents[1] / "ref" / dataset.name / "stats_loaded.json").read_text())["action"]
    true = np.quantile(reference["col/action"], 0.99, axis=0)
    width = np.ptp(reference["col/action"], axis=0)
    wrong = "q99" in stored and (np.abs(stored["q99"] - true) / width).max() > 0.01
    remarks = [line for line in source.remarks if "of action " in line]
    assert not wrong or remarks
    assert (dataset / "meta" / "stats.json").exists() or not remarks


BROKEN = sorted(path for path in (FOLDER / "broken").glob("*") if path.is_dir())
FAULTS = {
    "truncated_mp4": "episode", "empty_mp4": "episode", "missing_parquet": "episode", "missing_data_file": "episode",
    "missing_video": "episode", "missing_tasks": "tasks.jsonl is missing", "info_total_frames_lies": "total_frames",
    "info_total_episodes_lies": "total_episodes", "nan_action": "action of frame", "inf_state": "observation.state of",
    "timestamp_gap": "timestamp of frame", "length_mismatch": "rows of it", "fewer_video_frames": "no picture for",
    "task_index_out_of_range": "task_index", "wrong_shape_in_info": "info.json says", "bad_json": "info.json cannot",
    "truncated_parquet": "cannot be read", "future_version": "is not read", "layout": "convert_dataset_v1_to_v2",
}  # fmt: skip
WHOLE_SET = ("missing_tasks", "wrong_shape_in_info", "bad_json", "future_version", "layout")


@pytest.mark.parametrize("dataset", BROKEN, ids=lambda path: path.name)
def test_what_is_broken_is_named_before_training_or_left_out(dataset: Path, tmp_path: Path) -> None:
    camera = {"primary": "observation.images.front"}
    if (info := dataset / "meta" / "info.json").exists() and "bad_json" not in dataset.name:
        features = json.loads(info.read_text())["features"]
        camera = {"primary": next(name for name, one in features.items() if one["dtype"] in ("video", "image"))}
    copied(dataset, tmp_path)
    spec = described(dataset.name, camera)
    fault = dataset.name.split("_", 1)[1]
    if fault not in FAULTS:
        source = LeRobot(tmp_path, dataset.name, spec)
        assert not source.index.skipped
        assert all(source.pixels("primary", step) is not None for step in range(source.index.num_steps))
        return
    with pytest.raises(BadShardError, match=FAULTS[fault]) as raised:
        LeRobot(tmp_path, dataset.name, spec).prepare()
    assert dataset.name in str(raised.value)
    if fault in WHOLE_SET:
        with pytest.raises(BadShardError):
            LeRobot(tmp_path, dataset.name, spec, bad_trajectories="skip").prepare()
        return
    source = LeRobot(tmp_path, dataset.name, spec, bad_trajectories="skip")
    assert source.index.skipped
    episodes = [one["trajectory"] for one in source.index.skipped if one["file"] != "meta/info.json"]
    said = sum(1 for _ in (dataset / "meta" / "episodes.jsonl").open()) if "v2" in dataset.name else None
    assert said is None or source.index.num_trajectories == said - len(episodes)
    assert all(source.pixels("primary", step) is not None for step in range(source.index.num_steps))


@every_dataset
def test_chunks_and_what_is_padding_are_the_library_s(dataset: Path, tmp_path: Path) -> None:
    width = Reference(dataset)["col/action"].shape[1]
    source, reference = opened(dataset, tmp_path, absolute=[True] * width)
    wanted, padded = reference["chunk8/action"], reference["chunk8/action_is_pad"]
    every = np.arange(source.index.num_steps)
    steps = DatasetSteps(source, every.astype(np.int32), source.statistics, "quantile", wanted.shape[1], "mask")
    np.testing.assert_array_equal(steps.padded(every), padded)
    np.testing.assert_array_equal(steps.recorded(every)[0], wanted)
    np.testing.assert_array_equal(steps.actions(every), source.statistics.normalise(wanted))
