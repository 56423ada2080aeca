"""The instruction at each step of a trajectory, from any stored form."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.oxe.leaves import leaf_at
from openvla_lightning.data.oxe.spec import Trajectory

_SAME: dict[bytes, bytes] = {}
"""Makes equal texts of this process one object, because a dataset has millions of steps and thousands of texts."""
MOST_KEPT = 1_000_000


def instructions_of(trajectory: Trajectory, path: str, steps: int) -> NDArray[Any]:
    """The instruction of each step as UTF-8 bytes, object [steps].

    It is stored once per step, or once per episode (in the episode's metadata, or as a single text). If a step has
    several texts, the first one that is not blank counts. If an episode has only one text, it applies to all steps;
    in an episode with several texts, blank steps stay blank.

    Args:
        trajectory: the trajectory after its transform; text is bytes or strings.
        path: path of the instruction.
        steps: number of steps in the trajectory.

    Raises:
        KeyError: `path` exists neither in the steps nor in the episode's metadata.
        ValueError: it is not text, or the number of entries differs from the number of steps.
    """
    leaf = _leaf(trajectory, path)
    texts = np.asarray(leaf, object)
    if texts.ndim == 0:
        texts = np.full(steps, texts[()], object)
    if len(texts) != steps:
        raise ValueError(f"there are {steps} actions and {len(texts)} entries of {path}")
    found = np.empty(steps, object)
    for step, entry in enumerate(texts.reshape(steps, -1) if steps else []):
        encoded = [_encoded(text, path) for text in entry]
        found[step] = next((text for text in encoded if text.strip()), b"")
    said = {text for text in found if text}
    if len(said) == 1:
        found[:] = said.pop()
    return found


def numbered(parts: Iterable[NDArray[Any]]) -> tuple[NDArray[np.int32], list[bytes]]:
    """Replace texts by places in the sorted list of distinct texts: int32 [N], and this list."""
    first: dict[bytes, int] = {}
    numbers = [
        np.fromiter((first.setdefault(text, len(first)) for text in part), np.int32, len(part)) for part in parts
    ]
    words = sorted(first)
    place = np.empty(len(words), np.int32)
    place[[first[text] for text in words]] = np.arange(len(words), dtype=np.int32)
    every = np.concatenate(numbers) if numbers else np.zeros(0, np.int32)
    return place[every], words


def _leaf(trajectory: Trajectory, path: str) -> Any:
    try:
        return leaf_at(trajectory, path)
    except KeyError as error:
        metadata = trajectory.get("traj_metadata", {})
        for place in (metadata, metadata.get("episode_metadata", {})):
            try:
                return leaf_at(place, path)
            except (KeyError, AttributeError):
                continue
        raise error


def _encoded(text: Any, path: str) -> bytes:
    if isinstance(text, str):
        text = text.encode("utf-8")
    if not isinstance(text, bytes):
        raise ValueError(f"{path} is not text but {type(text).__name__}: {str(text)[:40]}")
    if len(_SAME) > MOST_KEPT:
        _SAME.clear()
    return _SAME.setdefault(bytes(text), bytes(text))
