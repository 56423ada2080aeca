"""The files under `meta/`: parquet, JSON, JSON lines. Whatever is wrong with one names it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.runtime.files import pointer

WHOLE = {"state": "observation.state", "action": "action"}
"""The vectors whose slices `modality.json` names, unless an entry says otherwise."""


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """A whole parquet file, or some of its columns, as a `pyarrow.Table`.

    Raises:
        BadShardError: it is missing or damaged, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    if not path.exists():
        raise BadShardError(f"{path} is missing")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if absent := [name for name in columns or () if name not in file.schema_arrow.names]:
            raise BadShardError(f"{path} has no column {', '.join(absent)}")
        return file.read(columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadShardError(f"{path} cannot be read: {pointer(path) or ' '.join(str(error).split())}") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds, with or without a byte order mark; raises BadShardError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise BadShardError(f"{path} cannot be read: {pointer(path) or error}") from None


def read_json_lines(path: Path) -> list[Any]:
    """What each line of a file holds, blank ones left out; raises BadShardError naming the file."""
    if not path.exists():
        raise BadShardError(f"{path} is missing")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        return [json.loads(line) for line in lines]
    except (ValueError, OSError) as error:
        raise BadShardError(f"{path} cannot be read: {pointer(path) or error}") from None


def read_modality(path: Path, widths: Mapping[str, int]) -> dict[str, Any]:
    """GR00T's names of slices of the vectors; empty if the file is missing.

    Args:
        path: the file.
        widths: numbers per step of each column.

    Raises:
        BadShardError: it has another form, or a slice ends behind its vector.
    """
    found = read_json(path) if path.exists() else {}
    for part in ("state", "action", "video", "annotation"):
        entries = found.get(part, {}) if isinstance(found, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise BadShardError(f"{path}: {part} is no mapping of names to objects")
        for name, entry in entries.items() if part in WHOLE else ():
            key, bounds = entry.get("original_key", WHOLE[part]), (entry.get("start"), entry.get("end"))
            if not all(isinstance(bound, int) for bound in bounds) or bounds[1] > widths.get(key, bounds[1]):
                raise BadShardError(
                    f"{path}: {part}.{name} is {bounds[0]} to {bounds[1]} of {key}, which has {widths.get(key)} numbers"
                )
    return found
