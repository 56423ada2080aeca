"""Reads back what Weights & Biases wrote offline, with its own reader."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def attempts(folder: Path) -> list[Path]:
    """What was written into a run's folder, oldest first: one folder per process."""
    return sorted(folder.glob("wandb/offline-run-*"))


@cache
def records(attempt: Path) -> list[Record]:
    """All records of one attempt, in order; each has a `type`, and its content under that name."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(attempt)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def of_type(found: list[Record], kind: str) -> list[Record]:
    """The contents of the records of one type."""
    return [record[kind] for record in found if record["type"] == kind]


def run(found: list[Record]) -> Record:
    """Id, group, job type, tags and name."""
    return of_type(found, "run")[0]


def history(found: list[Record]) -> list[dict[str, Any]]:
    """Logged rows, metric -> value."""
    return [record["item"] for record in of_type(found, "history")]


def config(found: list[Record]) -> dict[str, Any]:
    """Config columns as they are at the end."""
    return _updates(of_type(found, "config"))


def summary(found: list[Record]) -> dict[str, Any]:
    """The last value of each metric, and what was put there by hand."""
    return _updates(of_type(found, "summary"))


def tables(attempt: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {columns, data}) of each table, in the order in which they were logged."""
    media = attempt / "files" / "media" / "table"
    for path in sorted(media.rglob("*.table.json"), key=lambda path: path.stat().st_mtime_ns):
        yield f"{path.parent.relative_to(media)}/{path.name.split('_')[0]}", json.loads(path.read_text())


def _updates(found: list[Record]) -> dict[str, Any]:
    return {name: value for record in found for name, value in record.get("update", {}).items()}
