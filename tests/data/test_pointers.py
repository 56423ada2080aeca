"""Datasets that were cloned without Git LFS, or written in another encoding: the file is named, and what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy_lerobot
import toy_rlds

from openvla_lightning.data.oxe import describe
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.lerobot.meta_files import read_json_lines
from openvla_lightning.data.source.rlds import RLDS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7121920\n"


def test_an_rlds_file_that_was_not_downloaded_is_said_to_be_one(tmp_path: Path) -> None:
    toy_rlds.write(tmp_path / "toy" / "1.0.0")
    shard = next(tmp_path.glob("toy/1.0.0/toy-train*"))
    shard.write_text(POINTER)
    with pytest.raises(BadShardError, match=rf"{shard.name} is a Git LFS pointer.*`git lfs pull` in "):
        RLDS(tmp_path, "toy", describe("toy", toy_rlds.SPEC)).prepare()


@pytest.mark.parametrize("kind", ["data/*/*.parquet", "videos/**/*.mp4", "meta/episodes/**/*.parquet", "meta/tasks*"])
def test_a_lerobot_file_that_was_not_downloaded_is_said_to_be_one(tmp_path: Path, kind: str) -> None:
    toy_lerobot.write(tmp_path / "toy")
    file = next(tmp_path.glob(f"toy/{kind}"))
    file.write_text(POINTER)
    with pytest.raises(BadShardError, match=rf"{file.name} is a Git LFS pointer.*`git lfs pull` in "):
        toy_lerobot.opened(tmp_path).prepare()


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "Läden (alt)" / "meine Daten"
    toy_lerobot.write(folder)
    toy_lerobot.opened(folder.parent, folder.name).prepare()
    info = folder / "meta" / "info.json"
    info.write_bytes(info.read_text().replace("{", '{"who": "Müller", ', 1).encode("latin-1"))
    with pytest.raises(BadShardError, match=r"info\.json cannot be read: .*utf-8"):
        toy_lerobot.opened(folder.parent, folder.name).prepare()
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes('{"task_index": 0, "task": "öffne die Lade"}\n'.encode("latin-1"))
    with pytest.raises(BadShardError, match=r"tasks\.jsonl cannot be read: .*utf-8"):
        read_json_lines(tasks)


def changed(folder: Path, **changes: Any) -> None:
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fps": "ten"}, "fps is 'ten', not a number above 0"),
        ({"features": {"action": None}}, "features.action does not say its dtype"),
        ({"features": [1]}, "features. does not say its dtype"),
    ],
)
def test_what_a_description_says_wrongly_is_named_with_its_file(tmp_path: Path, changes: dict, said: str) -> None:
    folder = toy_lerobot.write(tmp_path / "toy")
    changed(folder, **changes)
    with pytest.raises(BadShardError, match=rf"info\.json: {said}"):
        toy_lerobot.opened(tmp_path).prepare()
    (folder / "meta" / "info.json").write_text("[]")
    with pytest.raises(BadShardError, match=r"info\.json holds no JSON object"):
        toy_lerobot.opened(tmp_path).prepare()


def test_only_files_that_are_called_as_the_dataset_says_are_read(tmp_path: Path) -> None:
    """A copy beside a file, what an archive of macOS brings, a byte order mark, ranges that are no ranges."""
    folder = toy_lerobot.write(tmp_path / "toy")
    steps = toy_lerobot.opened(tmp_path).index.num_steps
    again = tmp_path / "again" / "toy"
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns(".openvla_lightning"))
    for file in sorted(again.rglob("file-000.parquet")):
        shutil.copy(file, file.with_name("file-000 (1).parquet"))
        file.with_name("._file-000.parquet").write_bytes(b"\0\5\x16\7")
    changed(again, splits=["train"])
    info = again / "meta" / "info.json"
    info.write_bytes(b"\xef\xbb\xbf" + info.read_bytes())
    assert toy_lerobot.opened(tmp_path / "again").index.num_steps == steps
