"""TFRecord files, read through a memory map."""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.runtime.files import pointer

HEADER, FOOTER = 12, 4


def frame(record: bytes) -> bytes:
    """One record in the form of TFRecord files: length, its masked crc32c, payload, its masked crc32c."""
    length = struct.pack("<Q", len(record))
    return length + masked_crc(length) + record + masked_crc(record)


def masked_crc(data: bytes) -> bytes:
    """The checksum that TFRecord stores: crc32c, rotated and shifted by a constant."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def read(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the bytes of every record, checksums verified.

    Raises:
        BadShardError: the file ends inside a record or a checksum does not match.
    """
    for start, record in scan(path):
        if isinstance(record, BadShardError):
            raise record
        yield start, record


def scan(path: Path) -> Iterator[tuple[int, bytes | BadShardError]]:
    """As `read`, with an error in place of a damaged record.

    If a record's length is damaged, the start of the next one is unknown, so this error is the last item.
    """
    size = path.stat().st_size
    if not size:
        return
    if problem := pointer(path):
        yield 0, BadShardError(f"{path}: {problem}.")
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position, number = 0, 0
        while position < size:
            header = data[position : position + HEADER]
            start = position + HEADER
            if len(header) < HEADER:
                yield start, _bad(path, number, position, "the file ends inside its header")
                return
            if header[8:] != masked_crc(header[:8]):
                yield start, _bad(path, number, position, "the checksum of its length does not match")
                return
            end = start + struct.unpack("<Q", header[:8])[0]
            if end + FOOTER > size:
                missing = end + FOOTER - size
                yield start, _bad(path, number, position, f"it needs {missing} bytes more than the file has")
                return
            record = data[start:end]
            whole = data[end : end + FOOTER] == masked_crc(record)
            yield start, record if whole else _bad(path, number, position, "its checksum does not match")
            position, number = end + FOOTER, number + 1


def _bad(path: Path, number: int, position: int, why: str) -> BadShardError:
    return BadShardError(f"{path}: record {number} (byte {position}) is damaged: {why}.")
