"""array_record files, read by record number: their bytes are compressed, or else cut through by block headers."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openvla_lightning.data.source.records import BadShardError

SPAN = 2**32
"""A place in a file is the number of a record times this, and the offset inside the record."""

OPEN_FILES = 64


def is_array_record(name: str) -> bool:
    """Whether a file of this name is in array_record's format; tfds puts the format into the name."""
    return ".array_record" in name


class ArrayRecords:
    """Reads single records; keeps the last files open, and the last record, as a step's cameras share one."""

    def __init__(self) -> None:
        self._readers: OrderedDict[Path, Any] = OrderedDict()
        self._last: tuple[tuple[Path, int] | None, bytes] = None, b""
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def read(self, path: Path, place: int, length: int, *, keep: bool = True) -> bytes:
        """Some bytes of a record; with `keep` the file stays open for the next one.

        Raises:
            BadShardError: the file or the record is damaged.
        """
        number, begin = divmod(place, SPAN)
        if self._process != os.getpid():  # a reader does not survive a fork
            self.__init__()  # type: ignore[misc]
        if self._last[0] != (path, number):
            reader = self._readers.pop(path, None) or _open(path)
            self._last = (path, number), _record(reader, path, number)
            if keep:
                self._readers[path] = reader
            if not keep or len(self._readers) > OPEN_FILES:
                (reader if not keep else self._readers.popitem(last=False)[1]).close()
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


def _open(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    except RuntimeError as error:
        raise BadShardError(f"{path} is damaged: {error}.") from error


def _record(reader: Any, path: Path, number: int) -> bytes:
    try:
        record = bytes(reader.read([number])[0])
    except RuntimeError as error:
        raise BadShardError(f"{path}: record {number} is damaged: {error}.") from error
    if len(record) >= SPAN:
        raise BadShardError(f"{path}: record {number} has {len(record):,} bytes, more than can be addressed.")
    return record
