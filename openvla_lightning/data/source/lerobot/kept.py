"""Storage forms of packets and rows until the index is complete."""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.source.kept import Arrays, Form, T
from openvla_lightning.data.source.lerobot.packets import Video
from openvla_lightning.data.source.lerobot.rows import Rows

Packets = tuple[Video, NDArray[np.int64]]
Read = tuple[list[Rows], str | None]


def _pack_packets(found: Packets) -> Arrays:
    video, packets = found
    told = asdict(video) | {"extradata": base64.b64encode(video.extradata).decode()}
    return {"video": _text(told), "packets": packets}


def _unpack_packets(arrays: Arrays) -> Packets:
    told = _told(arrays["video"])
    told["time_base"] = tuple(told["time_base"])
    return Video(**told | {"extradata": base64.b64decode(told["extradata"])}), arrays["packets"]


def _pack_rows(found: Read) -> Arrays:
    rows, problem = found
    arrays: Arrays = {}
    for place, one in enumerate(rows):
        arrays |= {f"{place} {name}": _plain(column) for name, column in one.columns.items()}
    texts = [[name for name, column in one.columns.items() if column.dtype == object] for one in rows]
    told = [
        [one.number, one.file, list(one.columns), words, one.problem] for one, words in zip(rows, texts, strict=True)
    ]
    return arrays | {"told": _text({"rows": told, "problem": problem})}


def _unpack_rows(arrays: Arrays) -> Read:
    told = _told(arrays["told"])
    rows = []
    for place, (number, file, names, words, problem) in enumerate(told["rows"]):
        columns = {name: arrays[f"{place} {name}"] for name in names}
        columns |= {name: np.array(_told(columns[name]), object) for name in words}
        rows.append(Rows(number, file, columns, problem))
    return rows, told["problem"]


def _plain(column: NDArray[Any]) -> NDArray[Any]:
    return _text(column.tolist()) if column.dtype == object else column


def _text(told: Any) -> NDArray[Any]:
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def _told(array: NDArray[Any]) -> Any:
    return json.loads(array.tobytes())


PACKETS: Form[Packets] = Form(_pack_packets, _unpack_packets)
ROWS: Form[Read] = Form(_pack_rows, _unpack_rows)


def together(known: dict[int, T], read: Iterable[T], count: int) -> Iterator[tuple[bool, T]]:
    """All `count` results in order with whether each is new: the `known` ones, and those of `read` for other places."""
    rest = iter(read)
    for place in range(count):
        yield (False, known[place]) if place in known else (True, next(rest))
