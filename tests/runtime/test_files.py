"""What is written appears whole or not at all, is as readable as its user's other files, and leaves nothing behind."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reserving import reserved_by_another

from openvla_lightning.runtime import files
from openvla_lightning.runtime.files import (
    InUseError,
    readable,
    reserve,
    user_cache,
    writable,
    write_json,
    write_text,
    written_whole,
)


@pytest.fixture
def umask() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_what_is_written_obeys_the_umask_and_replaces_what_was_there(tmp_path: Path, umask: None) -> None:
    write_text(tmp_path / "deep" / "a.txt", "one")
    write_text(tmp_path / "deep" / "a.txt", "zwei ü")
    with written_whole(tmp_path / "folder", folder=True) as beside:
        (beside / "b.txt").write_text("b")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "zwei ü"
    assert [oct(p.stat().st_mode & 0o777) for p in (tmp_path / "deep" / "a.txt", tmp_path / "folder")] == [
        "0o644",
        "0o755",
    ]
    assert not list(tmp_path.rglob(f"*{files.ENDING}"))


@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path, folder: bool) -> None:
    write_text(tmp_path / "a", "old")

    def fail() -> None:
        with written_whole(tmp_path / "a", folder=folder) as beside:
            (beside / "x" if folder else beside).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}


def test_a_folder_with_content_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").touch()
    with pytest.raises(FileExistsError, match="a folder with content"), written_whole(tmp_path / "a", folder=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_with_the_path_that_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*facts\.json'"):  # noqa: PT012, SIM117
        with written_whole(tmp_path / "facts.json") as beside:
            beside.symlink_to("/dev/full")
            with beside.open("w") as file:
                file.write("x" * 100_000)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from openvla_lightning.runtime.files import written_whole\n"
        "with written_whole(Path(sys.argv[1]) / 'a', folder=True) as beside:\n"
        "    (beside / 'half').touch(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    write_json(tmp_path / "a", {})  # somebody may be at it still
    assert left.exists()
    old = time.time() - files.STALE - 1
    os.utime(left, (old, old))
    write_json(tmp_path / "a", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_where_there_is_no_home_the_cache_is_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache() == tmp_path / "cache" / "openvla_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be made below a file
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    assert tmp_path / "tmp" in user_cache().parents
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(PermissionError, match="set XDG_CACHE_HOME"):
        user_cache()


def test_readable_and_writable_try_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert readable(tmp_path / "file")
    assert not readable(tmp_path / "file" / "below")
    assert writable(tmp_path / "new")
    assert not writable(tmp_path / "file")
    assert not list((tmp_path / "new").iterdir())


def test_a_lock_lets_one_in_at_a_time_however_many_wait(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from openvla_lightning.runtime.files import alone
folder = Path(sys.argv[1])
for _ in range(20):
    with alone(folder / "lock", "counting"):
        (folder / "inside").mkdir()  # fails if another one is inside
        time.sleep(0.002)
        (folder / "inside").rmdir()
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(6)]
    assert [process.wait(60) for process in running] == [0] * 6
    assert not list(tmp_path.iterdir())


def test_a_folder_is_reserved_until_its_process_ends_even_by_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with reserved_by_another(tmp_path / "run", "training") as process:
        with pytest.raises(InUseError, match=rf"^process {process} on .* is training in .*run: wait until it ends"):
            reserve(tmp_path / "run", "training")
        reserve(tmp_path / "run", "evaluating").close()  # something else
    monkeypatch.setattr(files, "PATIENCE", 60.0)
    with reserve(tmp_path / "run", "training"):
        assert (tmp_path / "run" / ".training.lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} on")
    assert not list((tmp_path / "run").iterdir())


def test_reserved_folders_have_one_process_at_a_time_however_many_wait(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from openvla_lightning.runtime import files
files.time.sleep = lambda seconds, sleep=time.sleep: sleep(0.001)  # the wait between two attempts
folder = Path(sys.argv[1])
for _ in range(20):
    with files.reserve(folder, "counting"):
        (folder / "inside").mkdir()  # fails if another one is inside
        (folder / "inside").rmdir()
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_where_nothing_can_be_written_nothing_is_reserved(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with reserve(tmp_path / place, "training"):
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_texts_have_one_encoding_whatever_the_locale_says() -> None:
    """An index written under one locale is read under another, and instructions hold letters of any script."""
    package = Path(files.__file__).parents[1]
    unsaid = []
    for path in sorted(package.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            said = {keyword.arg for keyword in call.keywords}
            mode = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
            opened = call.func.attr == "open" and ("newline" in said or (mode and set(str(mode)) <= set("rwax+")))
            if (opened or call.func.attr in ("read_text", "write_text")) and "encoding" not in said:
                unsaid.append(f"{path.relative_to(package)}:{call.lineno}")
    assert not unsaid
