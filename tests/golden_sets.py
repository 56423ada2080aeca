"""The sets of golden numbers there are, and what is in them: asked before any test runs."""

import json
import os
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SMALL = Path(__file__).parent / "golden" / "released.tar.xz"
NAMES = ["small", "whole"] if os.environ.get("OPENVLA_GOLDEN") else ["small"]
LARGEST = pytest.mark.parametrize("each_golden", NAMES[-1:], indirect=True)
"""For what takes seconds and is the same in every set."""


def one(folder: Path, pattern: str) -> Path:
    """The only file or folder of that name: sets of golden numbers differ by a letter in it."""
    (path,) = folder.glob(pattern)
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive that is kept here."""
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and newer
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **safely)


@cache
def manifest(name: str) -> dict[str, Any]:
    """What the released pipeline said of the datasets of a set, by name; empty where there is no such set."""
    if name == "whole":
        found = sorted(Path(os.environ["OPENVLA_GOLDEN"]).glob("data/transforms/golden_transforms_*.manifest.json"))
        return json.loads(found[0].read_text())["datasets"] if found else {}
    with tarfile.open(SMALL) as archive:
        for member in archive:
            if member.name.endswith(".manifest.json"):
                return json.load(archive.extractfile(member))["datasets"]  # type: ignore[arg-type]
    raise FileNotFoundError(f"{SMALL} holds no manifest")


def cases(on_disk: bool = False) -> list[Any]:
    """Arguments `each_golden` (indirect) and `dataset`: every dataset of every set, or those whose files are kept."""
    return [
        pytest.param(name, dataset, id=f"{name}-{dataset}")
        for name in NAMES
        for dataset, facts in manifest(name).items()
        if not on_disk or facts.get("files", True)
    ]
