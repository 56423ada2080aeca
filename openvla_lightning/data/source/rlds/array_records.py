"""array_record files, read by record number, because their bytes are compressed or interrupted by block headers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.open_files import OPEN
from openvla_lightning.runtime.files import pointer

SPAN = 2**32
"""A place in a file is `record number * SPAN + offset in the record`."""

WEIGHT = 4
"""A reader has buffers and its own thread, and costs about as much as this many open files."""

_reading_process: int | None = None
"""The process that first read a file; the library's state does not work in processes forked from it."""


def start_method() -> str:
    """Start method of worker processes: `fork`, or `spawn` once this process has read array_record files.

    The library cleans up in its own thread. A forked process has the thread's locks but not the thread, so reading
    crashes there.
    """
    return "fork" if _reading_process is None else "spawn"


def is_array_record(name: str) -> bool:
    """Whether a file's name contains the format array_record, as tfds writes it."""
    return ".array_record" in name


class ArrayRecords:
    """Reads single records; keeps files open within the process's budget, and the last record for other cameras."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Path, int] | None, bytes] = None, b""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def read(self, path: Path, place: int, length: int, *, keep: bool = True) -> bytes:
        """Read bytes of a record; with `keep`, the file stays open for the next one.

        Raises:
            BadShardError: the file or the record is damaged.
            RuntimeError: this process was forked from one that had read array_record files.
        """
        number, begin = divmod(place, SPAN)
        _check_not_forked()
        if self._last[0] != (path, number):
            reader = OPEN.get(("array_record", path), lambda: _open(path), _close, WEIGHT) if keep else _open(path)
            try:
                self._last = (path, number), _record(reader, path, number)
            finally:
                if not keep:
                    reader.close()
        return self._last[1][begin : begin + length]


def scan_array_record(path: Path) -> Iterator[tuple[int, bytes | BadShardError]]:
    """Yield the place and the bytes of every record; for a damaged record, an error replaces the bytes."""
    try:
        reader = _open(path)
    except BadShardError as error:
        yield 0, error
        return
    try:
        for number in range(reader.num_records()):
            try:
                yield number * SPAN, _record(reader, path, number)
            except BadShardError as error:
                yield number * SPAN, error
    finally:
        reader.close()


def _check_not_forked() -> None:
    global _reading_process
    if _reading_process not in (None, os.getpid()):
        raise RuntimeError(
            "array_record files cannot be read in a process forked from one that has read some: "
            'start it with multiprocessing.get_context("spawn")'
        )
    _reading_process = os.getpid()


def _open(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    _check_not_forked()
    try:
        return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    except RuntimeError as error:
        raise BadShardError(f"{path} is damaged: {pointer(path) or error}.") from error


def _close(reader: Any) -> None:
    if _reading_process == os.getpid():  # in a forked process, it cannot be used, not even closed
        reader.close()


def _record(reader: Any, path: Path, number: int) -> bytes:
    try:
        record = bytes(reader.read([number])[0])
    except RuntimeError as error:
        raise BadShardError(f"{path}: record {number} is damaged: {error}.") from error
    if len(record) >= SPAN:
        raise BadShardError(f"{path}: record {number} has {len(record):,} bytes, more than can be addressed.")
    return record
