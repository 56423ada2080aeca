"""Files that stay open for the next read, with one budget per process for all datasets."""

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

MOST = 4096
"""Limit of open files even if the system allows more, because each costs memory in the kernel."""


@cache
def budget() -> int:
    """How many files this process may keep open for reading: half of the system's limit.

    The soft limit is first raised to the hard one, because Linux' default of 1024 is few for a mixture of 25 datasets.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # the system allows less than it reports, as on macOS
            pass
    unlimited = soft == resource.RLIM_INFINITY
    return MOST if unlimited else max(8, min(MOST, soft // 2))


class OpenFiles:
    """Keeps recently used files open, and closes the least recently used ones.

    One object serves all datasets of the process. A forked process continues with its own copies; a spawned one starts
    empty.

    Args:
        most: files (or readers, which count as `weight` files each) kept open; None: `budget()`.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._open: OrderedDict[Any, tuple[Any, Callable[[Any], None], int]] = OrderedDict()
        self._used = 0

    def get(self, key: Any, open_it: Callable[[], Any], close: Callable[[Any], None], weight: int = 1) -> Any:
        """The result of `open_it` for `key`; it is opened again if it was closed meanwhile.

        Raises:
            OSError: it cannot be opened, even with all other files closed.
        """
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key][0]
        self._make_room((budget() if self.most is None else self.most) - weight)
        while True:
            try:
                opened = open_it()
                break
            except OSError as error:  # other code has files open, too
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                self._make_room(self._used // 2)
        self._open[key] = opened, close, weight
        self._used += weight
        return opened

    def forget(self, key: Any) -> None:
        """Close the file of `key`, if it is open."""
        if key in self._open:
            opened, close, weight = self._open.pop(key)
            self._used -= weight
            close(opened)

    def _make_room(self, used: int) -> None:
        while self._open and self._used > used:
            self.forget(next(iter(self._open)))


OPEN = OpenFiles()
"""The open files of this process."""


def read_at(path: Path, offset: int, length: int, check: Callable[[os.stat_result], None], stamp: Any = None) -> bytes:
    """Read bytes of a file, which stays open as long as the budget allows.

    Args:
        path: the file.
        offset, length: range of the bytes.
        check: raises an error if the file has changed.
        stamp: distinguishes different files that were at the same path at different times.

    Raises:
        OSError: the file cannot be read; the message names it.
    """
    for final in (False, True):
        try:
            descriptor = OPEN.get((path, stamp), lambda: os.open(path, os.O_RDONLY), os.close)
            check(os.fstat(descriptor))
            return os.pread(descriptor, length, offset)
        except OSError as error:
            OPEN.forget((path, stamp))  # on a network disk, the file handle may be stale: open it again
            if final or error.errno != errno.ESTALE:
                raise OSError(error.errno, error.strerror, str(path)) from error
    raise AssertionError("the second try returns or raises")
