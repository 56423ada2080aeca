"""Results of a pass for each file, stored until the index is complete, so that a killed pass can resume."""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.runtime.files import written_whole

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Form(Generic[T]):
    """Converts one kind of result to arrays without Python objects, and back."""

    pack: Callable[[T], Arrays]
    unpack: Callable[[Arrays], T]

    def save(self, path: Path, found: T) -> None:
        """Write a result atomically."""
        with written_whole(path) as beside, beside.open("wb") as file:
            np.savez(file, **self.pack(found))  # type: ignore[arg-type]

    def load(self, path: Path) -> T | None:
        """Read a result; None if it is missing or incomplete."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return self.unpack(dict(arrays))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None


def name_of(*told: Any) -> str:
    """Name of the file for a result that depends on these values."""
    return f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.npz"
