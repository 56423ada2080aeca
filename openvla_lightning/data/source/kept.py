"""What a pass has read of each file, kept until the index is whole: a killed pass goes on where it was."""

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
    """How one kind of result becomes arrays without Python objects, and comes back."""

    pack: Callable[[T], Arrays]
    unpack: Callable[[Arrays], T]

    def save(self, path: Path, found: T) -> None:
        """Write it, whole or not at all."""
        with written_whole(path) as beside, beside.open("wb") as file:
            np.savez(file, **self.pack(found))  # type: ignore[arg-type]

    def load(self, path: Path) -> T | None:
        """Read it; None where it is not there, or not whole."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return self.unpack(dict(arrays))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None


def name_of(*told: Any) -> str:
    """Name of the file for what was read under these circumstances."""
    return f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.npz"
