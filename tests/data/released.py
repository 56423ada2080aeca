"""Reads the golden files of the released data pipeline."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from golden_sets import one

Arrays = dict[str, np.ndarray]


def strings(arrays: Any, key: str) -> np.ndarray:
    """The byte strings under `key`, which are stored as one run of bytes and their lengths."""
    lengths = arrays[f"{key}#len"]
    ends = np.cumsum([0, *lengths.ravel()])
    run = arrays[f"{key}#bytes"].tobytes()
    pieces = [run[a:b] for a, b in pairwise(ends)]
    return np.array(pieces, object).reshape(lengths.shape)


def nested(leaves: Arrays) -> dict[str, Any]:
    """Turn `a/b` keys into nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> Arrays:
    """The inverse of `nested`."""
    leaves: Arrays = {}
    for key, node in tree.items():
        leaves |= flat(node, f"{prefix}{key}/") if isinstance(node, dict) else {f"{prefix}{key}": node}
    return leaves


def trajectories(golden: Path, dataset: str) -> Iterator[tuple[Arrays, Arrays]]:
    """Each trajectory of a dataset as (raw leaves, standardised leaves)."""
    arrays = np.load(one(golden / "data" / "transforms", "golden_transforms_*.npz"))
    found: dict[str, dict[str, Arrays]] = {}
    for key in arrays.files:
        if key.startswith(f"{dataset}|") and not key.endswith("#len"):
            name, _, kind = key.partition("#")
            _, number, part, path = name.split("|", 3)
            value = strings(arrays, name) if kind == "bytes" else arrays[key]
            found.setdefault(number, {}).setdefault(part, {})[path] = value
    for number in sorted(number for number, parts in found.items() if "raw" in parts):
        yield found[number]["raw"], found[number]["std"]


def normalised(golden: Path, dataset: str) -> Iterator[tuple[int, Arrays]]:
    """What the released loader yields of a dataset: number of the trajectory, `scheme|leaf` -> values."""
    arrays = np.load(one(golden / "data" / "transforms", "golden_transforms_*.npz"))
    found: dict[int, Arrays] = {}
    for key in arrays.files:
        if key.startswith(f"{dataset}|") and "|norm|" in key and not key.endswith("#len"):
            name, _, kind = key.partition("#")
            number, leaf = int(name.split("|")[1]), name.split("|norm|")[1]
            found.setdefault(number, {})[leaf] = strings(arrays, name) if kind == "bytes" else arrays[key]
    yield from sorted(found.items())
