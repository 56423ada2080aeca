"""What one user indexes others can read; where nothing may be written, that is found before the pass."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import made_rlds
import pytest

from openvla_lightning.runtime.files import alone

OTHER = 1234
"""A user id without any rights here."""

AS_SOMEBODY_ELSE = """
import os, sys
from pathlib import Path
import made_rlds
made_rlds.write(Path(sys.argv[2]) / "warm", [made_rlds.episode()])
made_rlds.source(Path(sys.argv[2]) / "warm").prepare()  # imports, which this user may not be able to read
os.setgroups([]); os.setgid(1234); os.setuid(1234)
root = Path(sys.argv[1])
for options in ({}, {"state": ["state"]}):
    source = made_rlds.source(root, **options)
    source.measure(source.index.trajectory.astype("int32"))
    print(source.index.num_steps, root in source._home.parents)
"""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    before = os.umask(0o022)
    root = tmp_path / "shared"
    made_rlds.write(root, [made_rlds.episode(6, i) for i in range(3)])
    made_rlds.source(root).prepare()
    yield root
    os.umask(before)


def test_an_index_is_as_readable_as_the_users_other_files(shared: Path) -> None:
    made = list((shared / "made" / "1.0.0" / ".openvla_lightning").rglob("*"))
    assert len(made) > 8
    assert {(path.is_dir(), oct(path.stat().st_mode & 0o777)) for path in made} == {(True, "0o755"), (False, "0o644")}


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become somebody else")
def test_somebody_else_trains_on_what_is_indexed_and_keeps_their_own_elsewhere(shared: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(0o755 if folder != Path("/tmp") else folder.stat().st_mode & 0o7777)
    for name in ("cache", "scratch"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-c", AS_SOMEBODY_ELSE, str(shared), str(tmp_path / "scratch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["18 True", "18 False"]


def test_an_index_that_cannot_be_read_is_made_again_elsewhere(shared: Path, tmp_path: Path, monkeypatch) -> None:
    first = made_rlds.source(shared)._home
    monkeypatch.setattr("openvla_lightning.data.source.index.readable", lambda path: False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    source = made_rlds.source(shared, cache_dir=tmp_path / "mine")
    assert tmp_path / "mine" in source._home.parents
    assert source._home.name == first.name


def test_without_any_place_to_write_the_pass_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode()])
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    build = "openvla_lightning.data.source.rlds.source.build_index"
    monkeypatch.setattr(build, lambda *a, **k: pytest.fail("it began"))
    with pytest.raises(PermissionError, match=r"index of made can be kept neither in .* data\.source\.cache_dir="):
        made_rlds.source(tmp_path, cache_dir=tmp_path / "file").prepare()


def test_a_dataset_that_may_not_be_entered_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("openvla_lightning.data.source.rlds.source.version_folder", refused)
    assert "made may not be read by this user" in made_rlds.source(tmp_path).missing()


def test_two_folders_of_one_name_have_caches_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    homes = []
    for root in (tmp_path / "a", tmp_path / "b"):
        made_rlds.write(root, [made_rlds.episode()])
        source = made_rlds.source(root, cache_dir=tmp_path / "cache")
        source.prepare()
        homes.append(source._home)
    assert homes[0].parent != homes[1].parent
    assert all(home.is_dir() for home in homes)


def test_of_several_processes_one_indexes_and_the_others_wait(tmp_path: Path) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode(6, i) for i in range(3)])
    code = "import sys, made_rlds; from pathlib import Path; made_rlds.source(Path(sys.argv[1])).prepare()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    home = made_rlds.source(tmp_path)._home
    with alone(home.parent / f".{home.name}.lock", "indexing"):
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(6)
        assert not home.exists()
    assert other.wait(60) == 0
    assert [path.name for path in home.parent.iterdir()] == [home.name]


def test_an_index_on_a_full_disk_is_an_error_with_its_folder_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    made_rlds.write(tmp_path, [made_rlds.episode()])
    source = made_rlds.source(tmp_path)

    def full(file: object, array: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{source._home}'"):
        source.prepare()
    assert not list(source._home.parent.iterdir())
    monkeypatch.undo()
    assert made_rlds.source(tmp_path).index.num_steps == 6


def test_locks_that_a_file_system_does_not_have_are_done_without(tmp_path: Path, monkeypatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    made_rlds.write(tmp_path, [made_rlds.episode()])
    assert made_rlds.source(tmp_path).index.num_steps == 6
