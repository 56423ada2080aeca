"""The newest checkpoint below a folder: one rule for all commands. It needs no torch."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ATTEMPTS = 20
STEP = re.compile(r"step_(\d+)\.ckpt")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest training checkpoint below `folder`, at any depth; None if there is none.

    Within a run, the highest step is the newest, regardless of file times. Of several runs, the one that was written to
    last counts. Folders may be links. A checkpoint that is a link does not count, because it leads to another
    checkpoint: Lightning's `last.ckpt` is such a link, or a copy.
    """
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError):  # a training that goes on has removed one meanwhile, and written another
            return _newest(Path(folder))
    return _newest(Path(folder))


def _newest(folder: Path) -> Path | None:
    runs: dict[Path, list[tuple[int, int, str]]] = {}
    for path in _checkpoints(folder):
        step = STEP.fullmatch(path.name)
        runs.setdefault(path.parent, []).append((path.stat().st_mtime_ns, int(step[1]) if step else -1, path.name))
    if not runs:
        return None
    place = max(runs, key=lambda run: max((written, name) for written, _, name in runs[run]))
    numbered = all(step >= 0 for _, step, _ in runs[place])
    return place / max(runs[place], key=lambda one: (one[1] if numbered else one[0], one[0], one[2]))[2]


def _checkpoints(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link to a parent folder would cause an endless loop
            folders.clear()
            continue
        visited.add(real)
        sharded = [name for name in folders if name.endswith(".ckpt")]
        folders[:] = [name for name in folders if name not in sharded]
        if os.path.basename(place) == "checkpoints":
            paths = [Path(place, name) for name in (*files, *sharded) if name.endswith(".ckpt") and name != "last.ckpt"]
            yield from (path for path in paths if not path.is_symlink())
