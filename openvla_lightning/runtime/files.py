"""Atomic writing of files and folders, lock files, and cache folders."""

import errno
import fcntl
import glob
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

log = logging.getLogger(__name__)

ENDING = ".unfinished"
POINTER = b"version https://git-lfs"
"""What a file begins with that was cloned without Git LFS."""
PATIENCE = 120.0
"""Seconds to wait for a folder that is in use: a file server frees the locks of a dead machine only after a while."""
STALE = 24 * 3600.0
"""Seconds after which an incomplete file is assumed to belong to a dead process."""


@contextmanager
def written_whole(path: str | Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` when the block ends without an error.

    Readers see either the old or the new content, never a part. If the block fails, nothing remains; incomplete files
    of killed processes are removed after a day. File modes follow the umask, so that other users can read the result
    like any other file.

    Args:
        path: the final path; its parent folder is created.
        folder: yield a new folder instead of a file's path.

    Raises:
        FileExistsError: `path` is a folder with content, which is not changed.
        OSError: it cannot be written; the message names `path`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid4().hex[:12]}{ENDING}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(path)
        if folder:
            beside.mkdir()
        yield beside
        if path.is_dir() and any(path.iterdir()):
            raise FileExistsError(errno.EEXIST, "a folder with content is there already", str(path))
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            delete(beside)
        if isinstance(error, OSError) and (error.filename is None or str(error.filename).startswith(str(beside))):
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        raise


def write_json(path: str | Path, content: Any, *, indent: int | None = 1) -> None:
    """Write `content` to `path` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def obey_umask(path: Path) -> None:
    """Give a file the mode of a new file, because some libraries write files that other users cannot read."""
    trial = path.with_name(f".{uuid4().hex[:12]}{ENDING}")
    trial.touch()
    path.chmod(trial.stat().st_mode & 0o777)
    trial.unlink()


def delete(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def below(folder: str | Path, name: str = "*") -> Iterator[Path]:
    """Every file called `name` (a pattern) in `folder` or deeper; folders may be links, none is visited twice."""
    visited: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        yield from (Path(place, file) for file in files if fnmatchcase(file, name))


def pointer(path: Path) -> str | None:
    """That a file is a Git LFS pointer, which stands where nothing was downloaded, and what to do; None where not."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(POINTER))
    except OSError:
        return None  # whoever reads it says so
    if begins != POINTER:
        return None
    return f"{path.name} is a Git LFS pointer, its content was not downloaded: `git lfs pull` in {path.parent} does"


def readable(path: Path) -> bool:
    """Whether `path` is a file that this user can read; an inaccessible parent folder is no error."""
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def writable(folder: Path) -> bool:
    """Whether this user can write into `folder`, which is created if necessary; found by trying to write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{uuid4().hex[:12]}{ENDING}"
        trial.touch()
        trial.unlink()
    except OSError:
        return False
    return True


def user_caches() -> list[Path]:
    """Cache folders of this user, best first; the last one also exists without a home folder."""
    xdg_cache = os.environ.get("XDG_CACHE_HOME")
    homes = [Path(xdg_cache)] if xdg_cache else []
    with suppress(RuntimeError):  # no home is known
        homes.append(Path.home() / ".cache")
    homes.append(Path(tempfile.gettempdir()) / f"cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}")
    return [home / "openvla_lightning" for home in homes]


def user_cache() -> Path:
    """The first writable folder of `user_caches`.

    Raises:
        PermissionError: none of them is writable.
    """
    for folder in (caches := user_caches()):
        if writable(folder):
            return folder
    raise PermissionError(
        f"none of {', '.join(map(str, caches))} can be written to: set XDG_CACHE_HOME to a folder that can"
    )


def _clear_stale(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{ENDING}"):
        with suppress(OSError):  # it belongs to another user, or was just renamed
            if time.time() - left.stat().st_mtime > STALE:
                delete(left)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, so that one process does a job while the others wait.

    If the file system has no locks, all processes do the job, which only costs time.
    """
    try:
        lock = _locked(path, what)
    except OSError:  # the folder cannot be written to, or the file system has no locks
        yield
        return
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, what: str) -> TextIO:
    while True:
        lock = path.open("w", encoding="utf-8")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info(f"another process is {what}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        if _is_still(lock, path):
            return lock
        lock.close()


def _is_still(lock: TextIO, path: Path) -> bool:
    """Whether a locked file is the one at `path`: the process before may have removed it, so that others lock anew."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False


class InUseError(ValueError):
    """Another process uses a folder that only one process may use at a time."""


def reserve(folder: str | Path, what: str) -> ExitStack:
    """Reserve `folder` for this process until the returned context ends; it also ends when the process is killed.

    Other processes may go on reading. If the folder cannot be written to or the file system has no locks, nothing is
    reserved.

    Args:
        folder: created if absent.
        what: what is done there, in one word, such as `training`; different things do not exclude each other.

    Raises:
        InUseError: another process has reserved it, and still has after `PATIENCE` seconds.
    """
    path, reserved = Path(folder) / f".{what}.lock", ExitStack()
    until: float | None = None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = reserved.enter_context(path.open("a+", encoding="utf-8"))
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, forked workers do not hold it, too
            if _is_still(lock, path):
                with suppress(OSError):  # the disk may be full
                    os.ftruncate(lock.fileno(), 0)
                    os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
                reserved.callback(path.unlink, missing_ok=True)
                return reserved
        except FileNotFoundError:
            pass  # the folder was removed meanwhile
        except BlockingIOError:
            with suppress(OSError):
                lock.seek(0)
            other = f"{lock.read() or 'another process'} is {what} in {folder}"
            if until is None:
                until = time.monotonic() + PATIENCE
                log.info(f"{other}; waiting {PATIENCE:g} seconds at most for it to end")
            elif time.monotonic() > until:
                raise InUseError(f"{other}: wait until it ends, or choose another folder") from None
            time.sleep(min(1.0, PATIENCE))
        except OSError:
            return reserved
        reserved.close()
