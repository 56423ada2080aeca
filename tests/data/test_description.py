"""Which folder and which files count, and what a description says that the files do not hold."""

from pathlib import Path

import made_rlds
import numpy as np
import pytest
import tensorflow_datasets as tfds

from openvla_lightning.data.oxe import describe
from openvla_lightning.data.oxe.spec import DescriptionError
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.rlds.description import check_description, newest, read_splits

STRAYS = ["README.md", "dataset_statistics_0123abcd.json", ".nfs0000001", ".DS_Store", "made-train.tfrecord.bak"]
STRAYS += ["other-train.tfrecord-00000-of-00001", "made-train.tfrecord-00007-of-00009"]


@pytest.mark.parametrize(
    ("versions", "read"),
    [
        (["1.0.0", "1.0.0.bak"], "1.0.0"),
        (["1.0.0", "1.0.0.incompleteABC123"], "1.0.0"),
        (["1.0.0", "1.0.0.2024-05-01", "backup", "9"], "1.0.0"),
        (["1.0.0", "0.10.0", "0.9.0", "1.0.0_old"], "1.0.0"),
        (["0.9.0", "0.10.0"], "0.10.0"),
        (["backup"], "backup"),
        (["1.0.0.incompleteABC123"], None),
        ([], None),
    ],
)
def test_a_version_has_its_exact_form_where_any_has(versions: list[str], read: str | None) -> None:
    assert newest(versions) == read


def test_a_copy_beside_the_version_is_not_read(tmp_path: Path) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(words="new")])
    folder = made_rlds.write(tmp_path, [made_rlds.episode(words="old")], version="0.0.1")
    folder.rename(folder.with_name("1.0.0.bak"))
    assert made_rlds.words(made_rlds.source(tmp_path)) == ["new"] * 6


def test_files_that_do_not_belong_to_the_dataset_change_nothing(tmp_path: Path) -> None:
    folder = made_rlds.write(tmp_path, [made_rlds.episode(6, i) for i in range(3)])
    home = made_rlds.source(tmp_path)._home
    made_rlds.source(tmp_path).prepare()
    for name in STRAYS:
        (folder / name).write_text("x")
        assert made_rlds.source(tmp_path)._home == home
    assert [path.name for path in home.parent.iterdir()] == [home.name]


def test_an_index_of_files_as_they_were_is_removed_and_one_of_another_description_is_not(tmp_path: Path) -> None:
    folder = made_rlds.write(tmp_path, [made_rlds.episode(6, i) for i in range(3)])
    other, first = made_rlds.source(tmp_path, state=["state"]), made_rlds.source(tmp_path)
    other.prepare()
    first.prepare()
    shard = next(folder.glob("*.tfrecord*"))
    shard.touch()
    second = made_rlds.source(tmp_path)
    second.prepare()
    assert first._home != second._home
    assert {path.name for path in second._home.parent.iterdir()} == {other._home.name, second._home.name}


def test_the_names_of_files_are_those_that_tfds_works_out(golden: Path, tmp_path: Path) -> None:
    folders = [path.parent for path in golden.rglob("dataset_info.json") if (path.parent / "features.json").exists()]
    folders.append(made_rlds.write(tmp_path, {"train": [made_rlds.episode()] * 3, "val": [made_rlds.episode()] * 2}))
    for folder in folders:
        splits = tfds.builder_from_directory(str(folder)).info.splits
        known = {name: ([Path(p).name for p in s.filepaths], list(s.shard_lengths)) for name, s in splits.items()}
        assert {s.name: ([*s.files], [*s.lengths]) for s in read_splits(folder)} == known


def test_damaged_descriptions_of_the_files_are_named(tmp_path: Path) -> None:
    folder = made_rlds.write(tmp_path, [made_rlds.episode()])
    info = (folder / "dataset_info.json").read_text()
    for content in ("{", "[]", '{"splits": [{"shardLengths": 3}]}'):
        (folder / "dataset_info.json").write_text(content)
        with pytest.raises(BadShardError, match=r"made/1\.0\.0/dataset_info\.json"):
            made_rlds.source(tmp_path).prepare()
    (folder / "dataset_info.json").write_text(info)
    (folder / "features.json").unlink()
    with pytest.raises(BadShardError, match=r"made/1\.0\.0 holds no features\.json: .*newer tfds"):
        made_rlds.source(tmp_path).prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": {"primary": "imag"}}, r"cameras\.primary: no 'imag'; did you mean 'image'\? Observation holds"),
        ({"state": ["joints"]}, "state: no 'joints' Observation holds image, state"),
        ({"action": "act"}, "action: no 'act'"),
        ({"language": "task"}, r"language: no 'task' A step or its episode holds action, episode_metadata/file,"),
        ({"state": ["image"]}, "state: 'image' is image, not numbers"),
        ({"action": ["action", "language_instruction"]}, "action: 'language_instruction' is text, not numbers"),
        (
            {"action": "observation"},
            "action: 'observation' is a group: name one of observation/image, observation/state",
        ),
        ({"language": "action"}, "language: 'action' is numbers, not text"),
    ],
)
def test_what_the_files_do_not_hold_is_said_before_anything_is_read(
    tmp_path: Path, options: dict, message: str
) -> None:
    made = made_rlds.features(metadata={"file": tfds.features.Text()})
    folder = made_rlds.write(tmp_path, [made_rlds.episode(metadata={"file": "f"})], made)
    for shard in folder.glob("*.tfrecord*"):
        shard.write_bytes(b"")
    with pytest.raises(DescriptionError, match=message):
        made_rlds.source(tmp_path, **options).check()
    made_rlds.source(tmp_path).check()
    for path in ("file", "episode_metadata/file", "traj_metadata/episode_metadata/file"):
        made_rlds.source(tmp_path, language=path).check()


def test_a_picture_of_depth_or_a_group_of_cameras_is_no_camera() -> None:
    depth = {"image": {"shape": {"dimensions": ["8", "8", "1"]}, "dtype": "float32", "encodingFormat": "png"}}
    cameras = {"featuresDict": {"features": {"front": {"image": {"encodingFormat": "jpeg"}}}}}
    observation = {"featuresDict": {"features": {"depth": depth, "cameras": cameras}}}
    step = {"featuresDict": {"features": {"observation": observation}}}
    features = {"featuresDict": {"features": {"steps": {"sequence": {"feature": step}}}}}
    for key, said in (("depth", "'depth' is depth, not image"), ("cameras", "is a group: name one of cameras/front")):
        spec = describe("made", {"cameras": {"primary": key}, "transform": f"{__name__}.keyed"})
        with pytest.raises(DescriptionError, match=f"cameras.primary: .*{said}"):
            check_description(spec, features)
    check_description(
        describe("made", {"cameras": {"primary": "cameras/front"}, "transform": f"{__name__}.keyed"}), features
    )


def keyed(trajectory: dict) -> dict:
    return trajectory | {"observation": trajectory["observation"] | {"joints": np.zeros((6, 2), np.float32)}}


def test_what_a_transform_makes_is_not_missed(tmp_path: Path) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode()])
    source = made_rlds.source(tmp_path, transform=f"{__name__}.keyed", state=["joints"])
    source.check()
    assert source.index.proprio.shape == (6, 2)


@pytest.mark.parametrize(("options", "what"), [({"mask": [True] * 6}, "mask"), ({"absolute": [False] * 6}, "absolute")])
def test_a_mask_of_the_wrong_width_is_found_at_the_first_trajectory(tmp_path: Path, options: dict, what: str) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(6, i) for i in range(3)])
    with pytest.raises(BadShardError, match=rf"trajectory 0: made: `{what}` has 6 entries.*data\.datasets\.made"):
        made_rlds.source(tmp_path, **options).prepare()


def test_a_typing_error_is_not_called_damage(tmp_path: Path) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode()])
    with pytest.raises(BadShardError) as caught:
        RLDS(tmp_path, "made", describe("made", {"cameras": {"primary": "imag"}})).prepare()
    assert "Get this file again" not in str(caught.value)
    assert "docs/data.md" in str(caught.value)
