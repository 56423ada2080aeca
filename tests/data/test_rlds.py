"""Real RLDS folders are read as the released pipeline reads them, and damage is found while indexing."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_rlds
from released import strings

from openvla_lightning.data.filters import select
from openvla_lightning.data.oxe import describe
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.writer import write_rlds


def toy(root: Path, **changes) -> RLDS:
    return RLDS(root, "toy", describe("toy", toy_rlds.SPEC | changes))


@pytest.fixture
def copy(toy_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy_root, tmp_path / "data", ignore=shutil.ignore_patterns(".openvla_lightning"))
    return tmp_path / "data"


def test_every_step_is_indexed_with_its_own_images(toy_root: Path) -> None:
    source = toy(toy_root)
    index = source.index
    step = 0
    for split, count in (("train", toy_rlds.TRAIN), ("val", toy_rlds.VAL)):
        for number in range(count):
            for meant in toy_rlds.episode(split, number)["steps"]:
                np.testing.assert_array_equal(index.action[step], meant["action"])
                np.testing.assert_array_equal(index.proprio[step], [*meant["observation"]["state"], 0])
                assert index.instructions[index.instruction[step]] == meant["language_instruction"]
                for role, key in (("primary", "image"), ("wrist", "wrist")):
                    shade = meant["observation"][key][0, 0].astype(int)
                    assert np.abs(source.image(role, step, toy_rlds.SIZE) - shade).max() <= 2
                assert source.image("secondary", step, toy_rlds.SIZE) is None
                step += 1
    assert index.num_steps == step
    assert index.num_trajectories == 15
    assert source.statistics.num_transitions == step
    assert "tensorflow" not in sys.modules


def test_indexing_in_processes_gives_the_same_index(copy: Path, toy_root: Path) -> None:
    parallel = RLDS(copy, "toy", describe("toy", toy_rlds.SPEC), workers=2).index
    for name in ("action", "proprio", "bounds", "split", "instruction"):
        np.testing.assert_array_equal(getattr(parallel, name), getattr(toy(toy_root).index, name))
    np.testing.assert_array_equal(parallel.images["wrist"], toy(toy_root).index.images["wrist"])


def test_the_index_is_made_once_and_again_when_something_changed(copy: Path) -> None:
    first = toy(copy)
    first.prepare()
    home = first._home
    stamp = (home / "action.npy").stat().st_mtime_ns
    toy(copy).prepare()
    assert (home / "action.npy").stat().st_mtime_ns == stamp
    assert toy(copy, state=["state"])._home != home
    shard = next(copy.glob("toy/1.0.0/toy-train*00000*"))
    os.utime(shard, ns=(1, 1))
    assert toy(copy)._home != home


def test_a_read_only_dataset_keeps_its_index_in_the_users_cache(copy: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    source = toy(copy)
    assert source.index.num_steps
    assert tmp_path / "cache" in source._home.parents
    assert not (copy / "toy" / "1.0.0" / ".openvla_lightning").exists()


def test_sources_travel_to_other_processes_without_their_arrays(toy_root: Path) -> None:
    source = toy(toy_root)
    source.image("primary", 3, 32)
    sent = pickle.dumps((source, source.index))
    assert len(sent) < 5000
    there, index = pickle.loads(sent)
    np.testing.assert_array_equal(there.image("primary", 3, 32), source.image("primary", 3, 32))
    np.testing.assert_array_equal(index.action, source.index.action)


def test_bridge_as_released(golden: Path, bridge_root: Path) -> None:
    arrays = np.load(golden / "data" / "bridge" / "golden_bridge.npz")
    stored = json.loads((golden / "data" / "bridge" / "golden_bridge.json").read_text())["bridge_orig_statistics"]
    source = RLDS(bridge_root, "bridge_dataset")
    index = source.index
    steps = {part: select(source, part, val_fraction=0, noop_filter="released")[0] for part in ("train", "val")}
    measured = source.statistics.to_dict()
    assert (measured["num_transitions"], measured["num_trajectories"]) == (400, 50)
    for part in ("action", "proprio"):
        for name, numbers in stored[part].items():
            exact = name in ("q01", "q99", "min", "max", "mask")
            compare = np.testing.assert_array_equal if exact else np.testing.assert_allclose
            compare(measured[part][name], numbers, **({} if exact else {"rtol": 1e-5, "atol": 1e-7}))
    for split, part in steps.items():
        assert len(part) == 200
        released = {name: arrays[f"bridge_orig/{split}/{name}"] for name in ("action_bounds_q99", "proprio_bounds_q99")}
        ours = source.statistics.normalise(index.action[part])
        np.testing.assert_array_equal(ours, released["action_bounds_q99"])
        ours = source.statistics.normalise(index.proprio[part], part="proprio")
        np.testing.assert_allclose(ours, released["proprio_bounds_q99"], atol=1e-6)
        words = [index.instructions[i] for i in index.instruction[part]]
        assert words == [w.decode() for w in strings(arrays, f"bridge_orig/{split}/language_instruction")]
        digests = arrays[f"bridge_orig/{split}/image_primary#sha1"].astype(str)
        for number, step in enumerate(part):
            file, offset, length = index.images["primary"][step].tolist()
            path = bridge_root / "bridge_dataset" / "1.0.0" / index.files[file]
            encoded = path.read_bytes()[offset : offset + length]
            assert hashlib.sha1(encoded).hexdigest() == digests[number]


def test_a_missing_dataset_says_where_it_was_looked_for_and_how_to_get_it(tmp_path: Path) -> None:
    message = RLDS(tmp_path, "libero_10_no_noops").missing()
    assert f"{tmp_path}/libero_10_no_noops/<version>/dataset_info.json" in message
    assert "openvla/modified_libero_rlds" in message
    assert "gs://gresearch/robotics/kuka" in RLDS(tmp_path, "kuka").missing()
    with pytest.raises(FileNotFoundError, match="modified_libero_rlds"):
        RLDS(tmp_path, "libero_10_no_noops").prepare()


def test_the_newest_version_is_read(toy_root: Path, tmp_path: Path) -> None:
    for version in ("0.9.0", "0.10.0"):
        shutil.copytree(toy_root / "toy" / "1.0.0", tmp_path / "toy" / version)
    assert toy(tmp_path).folder == tmp_path / "toy" / "0.10.0"


def damaged(copy: Path) -> Path:
    return next(copy.glob("toy/1.0.0/toy-train*00001*"))


def test_damage_is_found_while_indexing_and_names_the_file(copy: Path) -> None:
    shard = damaged(copy)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(BadShardError, match=r"toy-train\S*00001\S*: record 4 .* bytes more than the file has"):
        toy(copy).prepare()
    shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    with pytest.raises(BadShardError, match=r"record 0 .* checksum does not match"):
        toy(copy).prepare()
    shard.write_bytes(b"")
    with pytest.raises(BadShardError, match=r"holds 0 trajectories, dataset_info\.json says 5"):
        toy(copy).prepare()
    shard.unlink()
    with pytest.raises(BadShardError, match=r"1 of the \d files that dataset_info.json names are not there: toy-train"):
        toy(copy).prepare()
    assert not list(copy.glob("toy/1.0.0/.openvla_lightning/*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "task"}, r"trajectory 0: no 'task': the trajectory holds .*language_instruction"),
        ({"state": ["pose"]}, r"no 'observation/pose': observation holds .*image"),
        ({"cameras": {"primary": "rgb"}}, r"no 'observation/rgb': observation holds .*image"),
        ({"action": "act"}, r"no 'act'"),
        ({"action": "is_first", "mask": [True, True]}, r"`mask` has 2 entries, its actions have 1"),
    ],
)
def test_a_spec_that_does_not_fit_the_files_says_what_is_there(copy: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy(copy, **changes).prepare()


def test_an_action_that_is_not_finite_is_named(tmp_path: Path) -> None:
    def broken(split: str, index: int) -> dict:
        episode = toy_rlds.episode(split, index)
        if index == 1:
            episode["steps"][2]["action"] = np.full(7, np.nan, np.float32)
        return episode

    folder = tmp_path / "toy" / "1.0.0"
    write_rlds(folder, toy_rlds.FEATURES, {"train": 2}, broken, workers=0, progress=False)
    with pytest.raises(BadShardError, match=r"toy: .*trajectory 1: an action is not a finite vector"):
        toy(tmp_path).prepare()
