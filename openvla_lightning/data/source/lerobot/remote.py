"""Remote LeRobot datasets: single files from an object store or a web server, or whole datasets from the hub."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from openvla_lightning.data.source.lerobot.metadata import INFO, read_metadata
from openvla_lightning.data.source.store import WEB, StoreFiles

META_FILES = "meta/*"
FIRST_EPISODES = "meta/episodes/chunk-000/file-000.parquet"
META = (
    INFO,
    "meta/tasks.parquet",
    "meta/tasks.jsonl",
    "meta/episodes.jsonl",
    "meta/episodes_stats.jsonl",
    "meta/stats.json",
    "meta/modality.json",
    FIRST_EPISODES,
)
"""Files that are requested if a web server does not list its folders."""


class RemoteFiles(StoreFiles):
    """The files of the LeRobot dataset at a URL; each is fetched into the cache when it is needed.

    Args:
        url: URL of the dataset's folder.
        cache_dir: folder for fetched files; None: the user's cache.
        cache_gb: gigabytes of files that the whole cache holds, over all datasets.
    """

    INFO = INFO

    def __init__(self, url: str, cache_dir: str | Path | None, cache_gb: float) -> None:
        root, _, name = url.rstrip("/").rpartition("/")
        super().__init__(root, name, cache_dir, cache_gb)

    @cached_property
    def url(self) -> str:
        """The dataset's folder.

        Raises:
            FileNotFoundError: there is none.
        """
        self._store.info(f"{self.base}/{INFO}")
        return self.base

    @cached_property
    def folder(self) -> Path:
        """The local folder of this dataset, with a copy of `meta/`."""
        folder = self._prepared()
        for name in self._find("meta") or META:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            partial = (folder / name).with_suffix(f".{os.getpid()}.partial")
            with suppress(FileNotFoundError):
                self._store.get_file(f"{self.url}/{name}", str(partial))
                partial.replace(folder / name)
            partial.unlink(missing_ok=True)
        return folder

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Name of each existing file, quoted so that it has no slash -> its bytes."""
        found = self._find("data") | self._find("videos")
        if not found:
            metadata = read_metadata(self.folder)
            names = dict.fromkeys(episode.data for episode in metadata.episodes)
            names |= dict.fromkeys(clip.path for episode in metadata.episodes for clip in episode.clips.values())
            for name in names:
                with suppress(FileNotFoundError):
                    found[name] = int(self._store.info(f"{self.url}/{name}")["size"])
        return {quote(name, safe=""): size for name, size in found.items()}

    @property
    def names(self) -> dict[str, int]:
        """Name of each file below the dataset -> its bytes."""
        return {unquote(name): size for name, size in self.sizes.items()}

    @contextmanager
    def held(self, name: str) -> Iterator[Path]:
        """The local copy of a file, fetched if necessary; it is not removed within this context.

        Raises:
            OSError: it cannot be fetched, or its length differs from the store's.
        """
        with super().held(quote(name, safe="")) as path:
            yield path

    def _address(self, name: str) -> str:
        return f"{self.url}/{unquote(name)}"

    def _find(self, part: str) -> dict[str, int]:
        """Name -> bytes of every file below a folder of the dataset; empty if the store does not list files."""
        try:
            found = self._store.find(f"{self.url}/{part}", detail=True)
        except Exception:
            if self.base.startswith(WEB):  # not every web server lists
                return {}
            raise
        names = {
            f"{part}/" + path.rsplit(f"/{part}/", 1)[1]: entry for path, entry in found.items() if f"/{part}/" in path
        }
        return {name: int(entry.get("size") or 0) for name, entry in names.items()}


def downloaded(hub: str) -> Path | None:
    """The local folder of a downloaded hub dataset; None if it was not downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = hub.partition("@")
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None, "allow_patterns": [META_FILES]}
    try:  # only `meta/`, because cameras without a description are not downloaded
        return Path(snapshot_download(name, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        return None


def download(hub: str, videos: Sequence[str] | None = None) -> Path:
    """Download a dataset from the hub, or its missing files.

    Args:
        hub: `owner/name`, or `owner/name@revision`.
        videos: the cameras whose videos to download; None: only `meta/`.

    Returns:
        Its folder in the hub's cache.

    Raises:
        OSError: the hub cannot be reached and nothing was downloaded before, or it has no such dataset.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = hub.partition("@")
    patterns = [META_FILES]
    if videos is not None:
        patterns += ["data/*", *(f"videos/{key}/*" for key in videos), *(f"videos/*/{key}/*" for key in videos)]
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None, "allow_patterns": patterns}
    return Path(snapshot_download(name, **options))


@contextmanager
def local(remote: RemoteFiles | None, folder: Path, name: str) -> Iterator[Path]:
    """The local path of a file of the dataset; if the file is missing, the path does not exist."""
    if remote is None or name not in remote.names:
        yield folder / name
    else:
        with remote.held(name) as path:
            yield path
