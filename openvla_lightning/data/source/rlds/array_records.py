"""array_record files, read by record number: their bytes are compressed, or else cut through by block headers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.open_files import OPEN

SPAN = 2**32
"""A place in a file is the number of a record times this, and the offset inside the record."""

WEIGHT = 4
"""A reader costs about as much as this many open files: buffers and a thread of its own."""

_reading_process: int | None = None
"""The process that first read a file; what its library keeps is broken in processes forked from it."""


def start_method() -> str:
    """How worker processes may start from here: `fork`, or once this process has read array_record files `spawn`.

    The library cleans up in a thread of its own. A forked process has the thread's locks without the thread, and
    reading there ends in a crash.
    """
    return "fork" if _reading_process is None else "spawn"


def is_array_record(name: str) -> bool:
    """Whether a file of this name is in array_record's format; tfds puts the format into the name."""
    return ".array_record" in name


class ArrayRecords:
    """Reads single records; keeps files open within the process's budget, and the last record for its other cameras."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Path, int] | None, bytes] = None, b""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def read(self, path: Path, place: int, length: int, *, keep: bool = True) -> bytes:
        """Some bytes of a record; with `keep` the file stays open for the next one.

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
    """Yield the place and the bytes of every record, or an error in the place of a damaged one."""
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
        raise BadShardError(f"{path} is damaged: {error}.") from error


def _close(reader: Any) -> None:
    if _reading_process == os.getpid():  # in a forked process nothing of it can be used, not even its end
        reader.close()


def _record(reader: Any, path: Path, number: int) -> bytes:
    try:
        record = bytes(reader.read([number])[0])
    except RuntimeError as error:
        raise BadShardError(f"{path}: record {number} is damaged: {error}.") from error
    if len(record) >= SPAN:
        raise BadShardError(f"{path}: record {number} has {len(record):,} bytes, more than can be addressed.")
    return record
