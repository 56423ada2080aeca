"""LeRobot datasets whose `meta/` or folders have another form than usual: read all the same, or named at once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import toy_lerobot as toy

from openvla_lightning.data.source.faults import BadShardError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("lerobot") / "toy").parent


def rewritten(root: Path, folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """A copy of the toy whose JSON file `meta/<name>` is changed."""
    shutil.copytree(root / "toy", folder / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    path = folder / "toy" / "meta" / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(change(known)))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("info.json", lambda info: info | {"total_episodes": None}, "total_episodes is None, no number"),
        ("info.json", lambda info: info | {"video_path": None}, "video_path is None, but features.*front is a video"),
        ("info.json", lambda info: info["features"]["action"].update(shape=7) or info, "features.action is 7, no list"),
        ("modality.json", lambda _: {"state": {"arm": [0, 3]}}, "state is no mapping of names to objects"),
        ("modality.json", lambda _: {"action": {"arm": {"start": 0}}}, "action.arm is 0 to None of action"),
        ("modality.json", lambda _: {"action": {"arm": {"start": 5, "end": 9}}}, "which has 7 numbers"),
    ],
)
def test_a_meta_file_of_another_form_is_named_in_milliseconds(
    root: Path, tmp_path: Path, name: str, change: Callable[[Any], Any], said: str
) -> None:
    rewritten(root, tmp_path, name, change)
    with pytest.raises(BadShardError, match=rf"toy: .*meta/{name}: .*{said}"):
        toy.opened(tmp_path).check()


@pytest.mark.parametrize("column", ["length", f"videos/{toy.FRONT}/from_timestamp"])
def test_an_episode_without_a_number_is_named(root: Path, tmp_path: Path, column: str) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    path = next((tmp_path / "toy" / "meta" / "episodes").rglob("*.parquet"))
    table = pyarrow.parquet.read_table(path)
    place, nothing = table.schema.get_field_index(column), pyarrow.nulls(len(table), pyarrow.float64())
    pyarrow.parquet.write_table(table.set_column(place, column, nothing), path)
    with pytest.raises(BadShardError, match=r"toy: .*meta holds no number where one of an episode"):
        toy.opened(tmp_path).prepare()


def test_statistics_that_nobody_uses_may_be_damaged(root: Path, tmp_path: Path) -> None:
    rewritten(root, tmp_path, "stats.json", lambda known: known | {"action": 5})
    assert "cannot be read; they are not used" in toy.opened(tmp_path).remarks[0]


def test_splits_that_do_not_fit_are_said(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewritten(root, tmp_path, "info.json", lambda info: info | {"splits": {"train": "0:5", "val": "5:6"}})
    source = toy.opened(tmp_path)
    assert source.index.splits == ("train",)
    assert "its splits (train: 0:5, val: 5:6) do not hold each of its 7 episodes once" in source.remarks[0]
    assert "all are trained on" in caplog.text


def test_rows_need_no_entry_in_info_and_tasks_no_text(root: Path, tmp_path: Path) -> None:
    def without_rows(info: dict[str, Any]) -> dict[str, Any]:
        return info | {"features": {name: info["features"][name] for name in toy.FEATURES}}

    rewritten(root, tmp_path, "info.json", without_rows)
    tasks = tmp_path / "toy" / "meta" / "tasks.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"task_index": [0, 1], "task": ["go", None]}), tasks)
    assert toy.opened(tmp_path).index.instructions == ("go",)  # the only text of an episode holds for all of it
    for numbers, texts, said in (
        ([0, 1], [["go"], ["stop"]], r"task 0 of meta/ is \['go'\], no text"),
        ([0, 1, 0], ["go", "stop", "turn"], "task 0 of meta/ is both 'go' and 'turn'"),
        (["none", "1"], ["go", "stop"], "meta holds no number where .* 'none'"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"task_index": numbers, "task": texts}), tasks)
        with pytest.raises(BadShardError, match=f"toy: .*{said}"):
            toy.opened(tmp_path).prepare()


@pytest.mark.parametrize(
    "linked", ["data/chunk-000", "meta/episodes/chunk-000", f"videos/{toy.FRONT}", f"videos/{toy.FRONT}/chunk-000"]
)
def test_folders_may_be_links_to_another_disk(root: Path, tmp_path: Path, linked: str) -> None:
    folder, elsewhere = tmp_path / "toy", tmp_path / "disk" / "part"
    shutil.copytree(root / "toy", folder, ignore=shutil.ignore_patterns(".openvla_lightning"))
    elsewhere.parent.mkdir()
    shutil.move(folder / linked, elsewhere)
    (folder / linked).symlink_to(elsewhere)
    source = toy.opened(tmp_path)
    assert source.index.num_steps == sum(toy.LENGTHS)
    file = next(path for path in elsewhere.rglob("*") if path.is_file())
    os.utime(file, ns=(1, 1))
    assert toy.opened(tmp_path).files_key != source.files_key  # what is behind a link is looked at as well


def test_a_dataset_without_rows_says_where_they_are_missed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    shutil.rmtree(tmp_path / "toy" / "data")
    with pytest.raises(BadShardError, match=r"toy: .*/toy/data holds no parquet file"):
        toy.opened(tmp_path).prepare()
