"""Comparison of the statistics that a LeRobot dataset stores with those of its data."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.source.lerobot.meta_files import read_json, read_json_lines
from openvla_lightning.data.source.lerobot.metadata import Metadata

TOLERANCE = 0.01
"""A stored number is reported if its error is larger than this share of the dimension's range."""


def stored_statistics(metadata: Metadata) -> dict[str, dict[str, np.ndarray]]:
    """The statistics that the dataset stores: feature -> `min max mean std q01 q99` -> float64 [D]; empty if none.

    v2.1 has them per episode only; they are pooled as in the lerobot library.
    """
    folder = metadata.folder / "meta"
    numeric = {name for name, feature in metadata.features.items() if not feature.is_picture}
    if (path := folder / "stats.json").exists():
        stored = [read_json(path)]
    elif (path := folder / "episodes_stats.jsonl").exists():
        stored = [line["stats"] for line in read_json_lines(path)]
    else:
        return {}
    found = {}
    for name in sorted(numeric.intersection(*stored)):
        parts = [{key: np.asarray(value, np.float64).ravel() for key, value in one[name].items()} for one in stored]
        if all({"min", "max", "mean", "std"} <= part.keys() for part in parts):
            found[name] = parts[0] if len(parts) == 1 else _pooled(parts)
    return found


def _pooled(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    counts = np.stack([part["count"] for part in parts])
    share = counts / counts.sum(axis=0)
    means = np.stack([part["mean"] for part in parts])
    mean = (share * means).sum(axis=0)
    variance = (share * (np.stack([part["std"] for part in parts]) ** 2 + (means - mean) ** 2)).sum(axis=0)
    lowest, highest = (np.stack([part[key] for part in parts]) for key in ("min", "max"))
    return {"min": lowest.min(axis=0), "max": highest.max(axis=0), "mean": mean, "std": np.sqrt(variance)}


def compare(metadata: Metadata, columns: Mapping[str, Sequence[NDArray[Any]]]) -> list[str]:
    """One line for each feature whose stored statistics differ from those of `columns`.

    LeRobot's q01 and q99 are averages (in later versions envelopes) of single episodes' quantiles, not quantiles of the
    data, and deleting or merging episodes leaves outdated numbers. This reader does not use them.

    Args:
        metadata: of the dataset.
        columns: feature -> values [T, D] of every episode.
    """
    try:
        stored = stored_statistics(metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"the stored statistics cannot be read; they are not used: {error}"]
    lines = []
    for name in sorted(stored.keys() & columns.keys()):
        values = np.concatenate(list(columns[name])).astype(np.float64)
        if off := list(_differences(stored[name], values)):
            _, line = max(off)
            more = f", and {len(off) - 1} more" if len(off) > 1 else ""
            lines.append(f"the stored statistics of {name} are not those of its data: {line}{more}; they are not used")
    return lines


def _differences(stored: Mapping[str, NDArray[np.float64]], values: NDArray[np.float64]) -> Iterator[tuple[float, str]]:
    true = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
    }
    true["q01"], true["q99"] = np.quantile(values, [0.01, 0.99], axis=0)
    width = np.maximum(true["max"] - true["min"], 1e-12)
    for measure in sorted(stored.keys() & true.keys()):
        if len(stored[measure]) != len(width):
            continue
        off = np.abs(stored[measure] - true[measure]) / width
        dimension = int(np.argmax(off))
        if off[dimension] > TOLERANCE:
            yield (
                float(off[dimension]),
                f"{measure} of dimension {dimension} is said to be {stored[measure][dimension]:.4g} and is "
                f"{true[measure][dimension]:.4g}",
            )
