"""Action statistics that travel with a checkpoint."""

from typing import Any

import numpy as np

from openvla_lightning.model.source import CheckpointError, Source, read_json
from openvla_lightning.statistics import DatasetStatistics


def read_norm_stats(source: Source) -> dict[str, Any]:
    """Action statistics of a released folder or a Prismatic run, without its weights.

    The file beside the weights, which fine-tuning writes, goes before those in the config.

    Raises:
        CheckpointError: naming every dataset whose numbers cannot be used.
    """
    folder = source.path if source.path.is_dir() else source.path.parent.parent
    path = folder / "dataset_statistics.json"
    if path.is_file():
        stats: Any = read_json(path)
    else:
        stats = (read_json(source.path / "config.json").get("norm_stats") or {}) if source.kind == "released" else {}
    if not isinstance(stats, dict):
        raise CheckpointError(source.path, ["norm_stats must map dataset names to statistics"])
    problems = [f"statistics of {name!r}: {problem}" for name in stats for problem in _stats_problems(stats[name])]
    if problems:
        raise CheckpointError(source.path, problems)
    return stats


def _stats_problems(entry: Any) -> list[str]:
    try:
        action = DatasetStatistics.from_dict(entry).action
        low, high = action["q01"], action["q99"]
        widths = {len(values) for values in action.values()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{type(error).__name__}: {error}"]
    if len(widths) != 1:
        return [f"the action's measures have different widths {sorted(widths)}"]
    if not np.isfinite([low, high]).all() or (low > high).any():
        return ["q01 must lie below q99, all finite"]
    if not all(isinstance(value, bool) for value in entry["action"].get("mask", [])):
        return ["mask must hold true and false"]
    return []
