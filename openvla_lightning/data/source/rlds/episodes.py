"""Whole recorded trajectories, for inspection, replay and conversion, and the contents of their steps."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds.array_records import ArrayRecords, is_array_record, scan_array_record
from openvla_lightning.data.source.rlds.records import scan
from openvla_lightning.runtime.progress import track


@dataclass(frozen=True)
class Leaf:
    """One value of a step.

    Attributes:
        kind: `image`, `text`, or the dtype of numbers.
        shape: shape of a step's value; for images, as far as it is known.
        encoding: encoding of images, `jpeg` or `png`.
    """

    kind: str
    shape: tuple[int | None, ...] = ()
    encoding: str = "jpeg"


def declare(leaves: Mapping[str, Leaf]) -> Any:
    """`tfds.features` of trajectories with these `leaves` per step, from path (`observation/state`) -> leaf."""
    import tensorflow_datasets as tfds

    features = tfds.features
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf.kind == "image":
            node[name] = features.Image(shape=leaf.shape, encoding_format=leaf.encoding)
        elif leaf.kind == "text":
            node[name] = features.Text()
        else:
            node[name] = features.Tensor(shape=leaf.shape, dtype=np.dtype(leaf.kind))

    def built(node: Any) -> Any:
        return features.FeaturesDict({k: built(v) for k, v in node.items()}) if isinstance(node, dict) else node

    return features.FeaturesDict({"steps": features.Dataset(built(tree))})


def leaves_of(folder: Path) -> dict[str, Leaf]:
    """The leaves of a step of the dataset in `folder`: path -> leaf; the inverse of `declare`."""
    import tensorflow_datasets as tfds

    found: dict[str, Leaf] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, tfds.features.FeaturesDict):
            for key, child in node.items():
                walk(child, f"{path}/{key}" if path else key)
        elif isinstance(node, tfds.features.Image):
            shape = tuple(node.shape or (None, None, 3))
            found[path] = Leaf("image", shape, str(node.encoding_format or "png"))
        elif isinstance(node, tfds.features.Text):
            found[path] = Leaf("text")
        elif isinstance(node, tfds.features.Tensor):
            found[path] = Leaf(np.dtype(node.np_dtype).name, tuple(node.shape))

    walk(_info(folder).features["steps"].feature, "")
    return dict(sorted(found.items()))  # their order in tfds differs between processes


def read_episodes(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the trajectories of a split of the dataset in `folder`, before any standardisation.

    Each has the dataset's features; `steps` is a dictionary of arrays [T, ...] with images still encoded.

    Raises:
        ValueError: the dataset has no such split.
        BadShardError: a record is damaged.
    """
    import tensorflow_datasets as tfds

    info = _info(folder)
    if split not in info.splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(info.splits)}")
    for path in map(Path, info.splits[split].filepaths):
        for _, record in _scan(path):
            yield info.features.deserialize_example_np(record, decoders={"steps": tfds.decode.SkipDecoding()})


class Episodes:
    """The trajectories of all splits of the dataset in `folder`, by number.

    Attributes:
        splits: split -> its trajectories, first and one past the last.
        lengths: number of steps in each trajectory.
        words: the different texts at `language`, in the order of their first occurrence.

    Args:
        folder: folder of the version.
        language: path of the instruction.

    Raises:
        BadShardError: a record is damaged.
        KeyError: there is no text at `language`.
    """

    def __init__(self, folder: Path, language: str) -> None:
        self.folder, self.language = folder, language
        self.places: list[tuple[Path, int, int]] = []
        self.lengths: list[int] = []
        self.splits: dict[str, tuple[int, int]] = {}
        words: dict[str, None] = {}
        splits = _info(folder).splits
        paths = [(name, Path(path)) for name in splits for path in splits[name].filepaths]
        for split, path in track(paths, f"looking through {folder.parent.name}", len(paths), "files"):
            first = self.splits.get(split, (len(self.places), 0))[0]
            for start, record in _scan(path):
                texts = [text.decode() for text in leaf_of(self._steps(record), language).ravel().tolist()]
                self.places.append((path, start, len(record)))
                self.lengths.append(len(texts))
                words |= dict.fromkeys(texts)
            self.splits[split] = first, len(self.places)
        self.words = list(words)
        self.array_records = ArrayRecords()

    def __call__(self, number: int) -> dict[str, Any]:
        """The steps of a trajectory: nested dictionaries of arrays [T, ...], images still encoded."""
        path, start, length = self.places[number]
        if is_array_record(path.name):
            return self._steps(self.array_records.read(path, start, length))
        with path.open("rb") as file:
            return self._steps(os.pread(file.fileno(), length, start))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_features"}

    @cached_property
    def _features(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.features.FeatureConnector.from_json(json.loads(json.dumps(_info(self.folder).features.to_json())))

    def _steps(self, record: bytes) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        return self._features.deserialize_example_np(record, decoders={"steps": tfds.decode.SkipDecoding()})["steps"]


def leaf_of(steps: Mapping[str, Any], path: str) -> np.ndarray:
    """The array at a path of nested dictionaries."""
    node: Any = steps
    for part in path.split("/"):
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(f"no {path!r}: a step holds {', '.join(steps)}")
        node = node[part]
    return np.asarray(node)


def _info(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.WARNING)  # otherwise tfds logs every folder that it opens
    return tfds.builder_from_directory(str(folder)).info


def _scan(path: Path) -> Iterator[tuple[int, bytes]]:
    for start, record in scan_array_record(path) if is_array_record(path.name) else scan(path):
        if isinstance(record, BadShardError):
            raise record
        yield start, record
