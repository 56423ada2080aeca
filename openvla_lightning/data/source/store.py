"""Datasets in an object store or on a web server; files are fetched on demand into a cache of limited size."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import fsspec

from openvla_lightning.runtime.extras import install
from openvla_lightning.runtime.files import user_cache

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
WEB = ("http://", "https://")
TRIES = 2
SILENCE = 60.0  # a web server counts as gone after this many seconds without a byte


def is_url(root: str | Path) -> bool:
    """Whether `root` is read through fsspec instead of as a folder."""
    return "://" in str(root)


class StoreFiles:
    """The files of one dataset in a store. A subclass defines the layout of its format: `url`, `folder`, `sizes`.

    Several processes may share a cache. A file is never removed while a process reads it. If a process is killed, the
    kernel releases its locks, and its incomplete downloads are repeated.

    Args:
        root: any URL that fsspec understands: gs://, s3://, https://, file://.
        name: the dataset's name, which is its folder.
        cache_dir: folder for fetched files; None: the user's cache.
        cache_gb: limit of the whole cache in gigabytes, over all datasets; the least recently used files are removed
            first. Only files that are being read at the same time may exceed it.

    Raises:
        ValueError: `cache_gb` is not above 0.
    """

    INFO: str
    """The file below the dataset's folder whose existence shows that there is a dataset of this format."""

    def __init__(self, root: str, name: str, cache_dir: str | Path | None = None, cache_gb: float = 50.0) -> None:
        if cache_gb <= 0:
            raise ValueError(f"data.source.cache_gb={cache_gb}: gigabytes above 0")
        self.base, self.name, self.limit = f"{root.rstrip('/')}/{name}", name, int(cache_gb * 1e9)
        self.cache = Path(cache_dir).expanduser() if cache_dir else user_cache() / "remote"

    def missing(self) -> str | None:
        """Ask the store; return the problem, or None if the dataset is there."""
        protocol = self.base.split("://")[0]
        try:
            _ = self.url
        except FileNotFoundError as error:
            # fsspec raises this for every error of a web server
            if (cause := error.__cause__) and getattr(cause, "status", None) != 404:
                return f"{self.name}: {self.base} cannot be read: {type(cause).__name__}: {cause}"
            return (
                f"{self.name}: no {self.base}/{self.INFO}. Check data.source.root and the name; where "
                f"a store cannot list its folders, the files must lie in {self.base}/ itself"
            )
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            way_out = install(extra) if extra else str(error)
            return f"{self.name}: {protocol}:// cannot be read yet: {way_out}"
        except PermissionError as error:
            return f"{self.name}: {self.base} is there, but not for these credentials: {error}"
        except Exception as error:  # every store has errors of its own
            return f"{self.name}: {self.base} cannot be read: {type(error).__name__}: {error}"
        return None

    @cached_property
    def url(self) -> str:
        """The folder that holds the dataset's files.

        Raises:
            FileNotFoundError: there is none.
            Exception: any other error of the store.
        """
        raise NotImplementedError

    @cached_property
    def folder(self) -> Path:
        """The local folder of this dataset, with copies of its metadata files."""
        raise NotImplementedError

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Name of each existing file that is fetched on demand -> its bytes.

        Raises:
            OSError: the store does not give a size.
        """
        raise NotImplementedError

    def _prepared(self) -> Path:
        """The dataset's folder in the cache, one for each URL, with subfolders for fetched files."""
        folder = self.cache / f"{self.name.replace('/', '_')}_{sha256(self.url.encode()).hexdigest()[:12]}"
        for room in ("shards", "partial", "locks"):
            (folder / room).mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def held(self, name: str) -> Iterator[Path]:
        """The local copy of shard `name`, fetched if necessary; it is not removed within this context.

        Raises:
            OSError: it cannot be fetched, or its length differs from the store's.
        """
        path = self.folder / "shards" / name
        with _opened(self.folder / "locks" / name) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            while not self._whole(path):
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._whole(path):  # another process may have been faster
                    self._fetch(path)
                fcntl.flock(lock, fcntl.LOCK_SH)  # the lock is free for a moment, so check again
            with suppress(PermissionError):  # it may belong to another user of a shared cache
                os.utime(path)
            yield path

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of shard `name`."""
        # do not keep the file open: its space would stay in use after the cache removes it
        with self.held(name) as path, path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    @property
    def _store(self) -> Any:
        # fsspec keeps one per process; it must not be passed to another process
        options: dict[str, Any] = {}
        if self.base.startswith(WEB):
            import aiohttp

            # the default timeout ends every transfer after five minutes
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_read=SILENCE)}
        return fsspec.core.url_to_fs(self.base, **options)[0]

    def _list(self, folder: str) -> list[str]:
        try:
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._store.ls(folder, detail=False)]
        except FileNotFoundError:
            return []
        except Exception:
            if self.base.startswith(WEB):  # not every web server lists
                return []
            raise

    def _address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _whole(self, path: Path) -> bool:
        return path.exists() and path.stat().st_size == self.sizes[path.name]

    def _fetch(self, path: Path) -> None:
        size = self.sizes[path.name]
        partial = self.folder / "partial" / f"{size}_{path.name}"
        reason: Exception | None = None
        for _ in range(TRIES):
            self._make_room(partial, size)
            try:
                self._store.get_file(self._address(path.name), str(partial))
                if (arrived := partial.stat().st_size) == size:
                    partial.replace(path)
                    return
                reason = OSError(f"{arrived:,} of {size:,} bytes arrived")
            except Exception as error:  # every store has errors of its own
                reason = error
            finally:
                partial.unlink(missing_ok=True)
        raise OSError(f"{self.url}/{path.name} cannot be fetched: {type(reason).__name__}: {reason}") from reason

    def _make_room(self, partial: Path, size: int) -> None:
        """Remove the least recently used shards until `size` bytes fit; then create `partial`, which reserves them."""
        with _opened(self.cache / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = []
            for path in self.cache.glob("*/shards/*"):
                with suppress(FileNotFoundError):  # its owner replaced it meanwhile
                    kept.append((path.stat().st_mtime, path.stat().st_size, path))
            for path in self.cache.glob("*/partial/*_*"):
                kept.append((0.0, int(path.name.split("_")[0]), path))
            total = sum(taken for _, taken, _ in kept)
            for _, taken, path in sorted(kept):
                if total + size <= self.limit and path.parent.name == "shards":
                    break
                if path == partial or _let_go(path):
                    total -= taken
            partial.touch()


def _opened(lock: Path) -> IO[str]:
    """Open a lock file; another user's lock file is opened without write permission, which is enough to lock it."""
    try:
        return lock.open("w", encoding="utf-8")
    except PermissionError:
        if not lock.exists():
            raise
        return lock.open("r", encoding="utf-8")


def _let_go(path: Path) -> bool:
    """Remove a shard, or a dead process' incomplete one, unless a process holds it; return whether it was removed."""
    name = path.name if path.parent.name == "shards" else path.name.split("_", 1)[1]
    with _opened(path.parents[1] / "locks" / name) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True
