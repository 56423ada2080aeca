"""Descriptors for reading parts of files: as many at a time as suit the process, whoever reads."""

import os
import resource
from collections import OrderedDict
from pathlib import Path

SHARE = 4
"""A quarter of what a process may open: the rest is for loaders, sockets and libraries."""
MOST = 512


class OpenFiles:
    """Keeps files open that were read last, and closes the ones unused for the longest time."""

    def __init__(self) -> None:
        self.descriptors: OrderedDict[Path, int] = OrderedDict()

    @property
    def limit(self) -> int:
        """How many are open at once."""
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return MOST if allowed == resource.RLIM_INFINITY else max(8, min(MOST, allowed // SHARE))

    def descriptor(self, path: Path) -> int:
        """One for reading `path`; it stays valid until the next call."""
        if path in self.descriptors:
            self.descriptors.move_to_end(path)
            return self.descriptors[path]
        while len(self.descriptors) >= self.limit:
            os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors[path] = os.open(path, os.O_RDONLY)
        return self.descriptors[path]


OPEN = OpenFiles()
"""Of this process. A forked child reads on with the same descriptors, which `pread` allows."""


def descriptor(path: Path) -> int:
    """A descriptor of `path` for reading with `os.pread`; it stays open as long as the budget allows."""
    return OPEN.descriptor(path)
