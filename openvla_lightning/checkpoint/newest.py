"""Which checkpoint below a folder is the newest: one rule, for every command. It needs no torch."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

STEP = re.compile(r"step_(\d+)\.ckpt")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of ours below `folder`, at any depth, that was written last; None when there is none.

    Of one run that is the one of the highest step, whatever the clock said when it was written; of several runs, the
    one of the run that was written to last. Folders may be links. A checkpoint that is a link does not count, for it
    leads to another one: Lightning's `last.ckpt` is such a link, or a copy.
    """
    runs: dict[Path, list[tuple[int, int, str]]] = {}
    for path in _checkpoints(Path(folder)):
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
        if real in visited:  # a link that leads back up would have us walk in circles
            folders.clear()
            continue
        visited.add(real)
        sharded = [name for name in folders if name.endswith(".ckpt")]
        folders[:] = [name for name in folders if name not in sharded]
        if os.path.basename(place) == "checkpoints":
            found = [Path(place, name) for name in (*files, *sharded) if name.endswith(".ckpt") and name != "last.ckpt"]
            yield from (path for path in found if not path.is_symlink())
