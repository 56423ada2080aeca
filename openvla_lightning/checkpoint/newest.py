"""Which checkpoint below a folder is the newest: one rule, for every command. It needs no torch."""

import os
from collections.abc import Iterator
from pathlib import Path


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of ours below `folder`, at any depth, that was written last; None when there is none.

    Folders may be links. A checkpoint that is a link does not count, for it leads to another one: Lightning's
    `last.ckpt` is such a link, or a copy.
    """
    return max(_checkpoints(Path(folder)), key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def _checkpoints(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link that leads back up would have us walk in circles
            folders.clear()
            continue
        visited.add(real)
        sharded = [name for name in folders if name.endswith(".ckpt")]
        folders[:] = [name for name in folders if name not in sharded]
        if os.path.basename(place) == "checkpoints":
            found = [Path(place, name) for name in (*files, *sharded) if name.endswith(".ckpt") and name != "last.ckpt"]
            yield from (path for path in found if not path.is_symlink())
