"""Descriptions of checkpoints of all formats; one is read once, and checked before any tensor is read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openvla_lightning.runtime.files import POINTER, pointer
from openvla_lightning.statistics import DatasetStatistics

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Parameter name -> shape and dtype."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with every problem that was found."""

    def __init__(self, path: str | Path, problems: list[str]) -> None:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more"] if len(problems) > 40 else [])
        super().__init__("\n  - ".join([f"cannot load {path}:", *shown]))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model that an adapter belongs to.

    Attributes:
        path: folder, file or hub id from which it was loaded.
        sha256: hash of its weights, equal for all layouts of the same numbers (see `formats.weights_hash`). None if it
            was not stored; then any base with the right shapes is accepted.
    """

    path: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Description:
    """All contents of a checkpoint except its tensors.

    Attributes:
        path: the checkpoint's folder or file; for a folder of runs, the newest checkpoint.
        format: the format that reads its tensors.
        files: the files with the tensors.
        shapes: shape and dtype of each tensor, by its name in a VLA.
        norm_stats: dataset name -> action statistics in the released layout.
        vla: argument of `VLA.from_config`.
        processor: argument of `Processor.from_config`.
        problems: why no model or processor can be built from this description; the weights may still be loaded into an
            existing model.
        strategy: config of the training's strategy; None if it is unknown.
        base: the model that an adapter belongs to; None for a checkpoint with all weights.
        quantisation: how the base was quantised in training.
        recipe: the resolved config of the training.
        json_files: name -> content of the JSON files of a released folder.
        folder: folder of the tokenizer files; None if there is none.
        absent: parts of the model that the files lack because training had frozen them.
        one_dtype: whether all weights must have one dtype, and which one, if it is stated.
        keeps_adapters: whether the layout stores adapters of a whole model separately, as for towers with FiLM.
    """

    path: Path
    format: "Format"
    files: tuple[Path, ...]
    shapes: Shapes
    norm_stats: dict[str, Any]
    vla: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    strategy: dict[str, Any] | None = None
    base: Base | None = None
    quantisation: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    json_files: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    absent: tuple[str, ...] = ()
    one_dtype: tuple[bool, torch.dtype | None] = (False, None)
    keeps_adapters: bool = False

    def check(self) -> "Description":
        """Return this, or raise CheckpointError with `problems`."""
        if self.problems:
            raise CheckpointError(self.path, self.problems)
        return self


class Format(Protocol):
    """A checkpoint format. To add one, write a module with such a class, and add it to `formats.FORMATS`."""

    def recognises(self, path: Path) -> bool:
        """Whether the file or folder at `path` has this format, according to a quick check."""

    def describe(self, path: Path) -> Description:
        """The description of the checkpoint at `path`.

        Raises:
            CheckpointError: something is missing, malformed or contradictory; it lists all problems.
        """

    def tensors(self, description: Description) -> Iterator[dict[str, Tensor]]:
        """Its tensors by their names in a VLA, one file at a time; they stay on disk until they are used."""


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError for a Git LFS pointer, which stands where a file was not downloaded."""
    if problem := pointer(path):
        raise CheckpointError(path, [problem])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: when it is unreadable or no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(POINTER.decode()):
            refuse_pointer(path)
        value = json.loads(text)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, [f"is not readable JSON: {error}"]) from error
    if not isinstance(value, dict):
        raise CheckpointError(path, [f"must hold a JSON object, holds a {type(value).__name__}"])
    return value


def read_norm_stats(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Action statistics of a folder; the file beside the weights, which fine-tuning writes, overrides the config.

    Raises:
        CheckpointError: some numbers cannot be used; it names every such dataset.
    """
    path = folder / "dataset_statistics.json"
    stats: Any = read_json(path) if path.is_file() else (config.get("norm_stats") or {})
    if not isinstance(stats, dict):
        raise CheckpointError(folder, ["norm_stats must map dataset names to statistics"])
    problems = [f"statistics of {name!r}: {problem}" for name in stats for problem in _stats_problems(stats[name])]
    if problems:
        raise CheckpointError(folder, problems)
    return stats


def _stats_problems(entry: Any) -> list[str]:
    try:
        action = DatasetStatistics.from_dict(entry).action
        low, high = action["q01"], action["q99"]
        widths = {len(values) for values in action.values()}
        measured = {
            f"{part}.{name}": np.asarray(values, float)
            for part in ("action", "proprio")
            for name, values in entry.get(part, {}).items()
            if name != "mask"
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{type(error).__name__}: {error}"]
    if len(widths) != 1:
        return [f"the action's measures have different widths {sorted(widths)}"]
    if not np.isfinite([low, high]).all() or (low > high).any():
        return ["q01 must lie below q99, all finite"]
    if broken := [name for name, values in measured.items() if not np.isfinite(values).all()]:
        return [f"{', '.join(broken)} must hold finite numbers"]
    if not all(isinstance(value, bool) for value in entry["action"].get("mask", [])):
        return ["mask must hold true and false"]
    return []
