"""The shards of an RLDS dataset in an object store or on a web server."""

from contextlib import suppress
from functools import cached_property
from pathlib import Path

from openvla_lightning.data.source.rlds.description import METADATA, newest, read_splits
from openvla_lightning.data.source.store import StoreFiles
from openvla_lightning.runtime.files import readable, written_whole


class Shards(StoreFiles):
    """The files of the dataset at `<root>/<name>/<version>/`, or at `<root>/<name>/` if the store cannot list folders.

    The arguments are those of `StoreFiles`.
    """

    INFO = f"<version>/{METADATA[0]}"

    @cached_property
    def url(self) -> str:
        """The newest version's folder.

        Raises:
            FileNotFoundError: there is none.
            Exception: any other error of the store.
        """
        versions = [name for name in self._list(self.base) if name.split(".")[0].isdigit()]
        while (version := newest(versions)) is not None:
            with suppress(FileNotFoundError):
                self._store.info(f"{self.base}/{version}/{METADATA[0]}")
                return f"{self.base}/{version}"
            versions.remove(version)
        self._store.info(f"{self.base}/{METADATA[0]}")
        return self.base

    @cached_property
    def folder(self) -> Path:
        """The local folder of this dataset, with copies of its metadata files."""
        folder = self._prepared()
        listed = {name for name in self._list(self.url) if name.endswith((".json", ".txt"))}
        for name in {*METADATA, *listed}:
            content = self._store.cat_file(f"{self.url}/{name}")
            if not (readable(folder / name) and (folder / name).read_bytes() == content):
                with written_whole(folder / name) as beside:
                    beside.write_bytes(content)
        return folder

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Name of each shard -> its bytes, according to the store; shards that it does not list are left out.

        Raises:
            OSError: the store does not give a size.
        """
        names = sorted(name for split in read_splits(self.folder) for name in split.files)
        there = set(self._list(self.url))
        names = [name for name in names if name in there] or names
        sizes = dict(zip(names, self._store.sizes([f"{self.url}/{name}" for name in names]), strict=True))
        if unknown := [name for name, size in sizes.items() if size is None]:
            raise OSError(f"{self.url} does not say how long {unknown[0]} is, so that nobody knows when it is whole")
        return sizes
