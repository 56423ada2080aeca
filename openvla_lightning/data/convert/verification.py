"""Comparison of a converted dataset with its source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import Pixels
from openvla_lightning.runtime.progress import track

FRAMES = 4
"""How many pictures are compared per episode and camera: evenly spread, the first and the last included."""
MOST_LOST = 24.0
"""Mean distance of two pictures, in grey levels, above which they count as different pictures."""


class ConversionError(ValueError):
    """The written data differs from the source."""


@dataclass
class Verified:
    """Result of a comparison.

    Attributes:
        episodes, steps, pictures: how many were compared.
        losses: mean distance of each compared picture, in grey levels.
    """

    episodes: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        loss = ""
        if self.losses:
            loss = (
                f"; {len(self.losses):,} pictures are {np.mean(self.losses):.2f} grey levels away on average, "
                f"{max(self.losses):.2f} at most"
            )
        return f"verified: {self.episodes:,} episodes, {self.steps:,} steps, every number bit-equal{loss}"


Columns = Mapping[str, NDArray[Any]]
"""One episode: name -> numbers [T, ...] or texts [T]."""


def compare(
    episodes: int,
    read: Callable[[int], tuple[Columns, Mapping[str, Callable[[int], Pixels]]]],
    written: Callable[[int], tuple[Columns, Mapping[str, Callable[[int], Pixels]]]],
) -> Verified:
    """Compare all numbers and texts of every episode, and some of its pictures.

    Args:
        episodes: number of episodes.
        read, written: episode number -> columns, and camera -> step -> uint8 [H, W, 3], under the same names.

    Raises:
        ConversionError: something differs; the message names episode, column and step.
    """
    found = Verified()
    for number in track(range(episodes), "verifying", episodes, "episodes"):
        (columns, cameras), (own, own_cameras) = read(number), written(number)
        if columns.keys() != own.keys() or cameras.keys() != own_cameras.keys():
            differ = sorted((columns.keys() ^ own.keys()) | (cameras.keys() ^ own_cameras.keys()))
            raise ConversionError(f"episode {number}: {', '.join(differ)} is on one side only")
        length = 0
        for name, values in columns.items():
            length = len(values)
            _check(number, name, np.asarray(values), np.asarray(own[name]))
        for camera, picture in cameras.items():
            for step in np.unique(np.linspace(0, length - 1, FRAMES).round().astype(int)).tolist():
                found.losses.append(_loss(number, camera, step, picture(step), own_cameras[camera](step)))
        found.episodes, found.steps = found.episodes + 1, found.steps + length
    return found


def _check(number: int, name: str, one: NDArray[Any], other: NDArray[Any]) -> None:
    if one.shape != other.shape:
        raise ConversionError(f"episode {number}: {name} is {list(other.shape)}, it was {list(one.shape)}")
    same = one == other if one.dtype.kind in "OUS" else (one == other) | ((one != one) & (other != other))
    if not np.all(same):
        step = int(np.argwhere(~np.asarray(same))[0][0])
        raise ConversionError(f"episode {number}: {name} of step {step} is {other[step]!r}, it was {one[step]!r}")


def _loss(number: int, camera: str, step: int, one: Pixels, other: Pixels) -> float:
    if one.shape != other.shape:
        raise ConversionError(f"episode {number}: {camera} is {list(other.shape)}, it was {list(one.shape)}")
    loss = float(np.abs(one.astype(np.int16) - other).mean())
    if loss > MOST_LOST:
        raise ConversionError(
            f"episode {number}: {camera} of step {step} is another picture: {loss:.0f} grey levels away"
        )
    return loss


def texts(values: Sequence[Any]) -> NDArray[Any]:
    """Texts [T] as str, from bytes or str."""
    return np.array([one.decode() if isinstance(one, bytes) else str(one) for one in values], object)
