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

SMALLEST = 16
"""Sides from which 8-bit numbers [height, width, 1, 3 or 4] are taken for an image."""


@dataclass(frozen=True)
class Leaf:
    """One value of a step.

    Attributes:
        kind: `image`, `pixels` (an image stored as numbers), `text`, the dtype of numbers, or `other` for what is none
            of these: nested sequences, numbers whose count varies, images of more than 8 bits.
        shape: shape of a step's value; for images, as far as it is known.
        encoding: encoding of images, `jpeg` or `png`; of pixels, as in `arrays.Layout`.
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
            kind = "image" if node.np_dtype == np.uint8 else "other"
            found[path] = Leaf(kind, shape, str(node.encoding_format or "png"))
        elif isinstance(node, tfds.features.Tensor):
            said = node.to_json_content()  # texts and classes have no encoding
            found[path] = _leaf(np.dtype(node.np_dtype), tuple(node.shape), getattr(said, "encoding", "") or "none")
        else:
            found[path] = Leaf("other")

    walk(_info(folder).features["steps"].feature, "")
    return dict(sorted(found.items()))  # their order in tfds differs between processes


def _leaf(dtype: np.dtype[Any], shape: tuple[int | None, ...], encoding: str) -> Leaf:
    if dtype.kind in "OSU":
        return Leaf("text", shape)
    known = [length for length in shape if length is not None]
    if dtype == np.uint8 and len(known) == len(shape) == 3 and min(known[:2]) >= SMALLEST and known[2] in (1, 3, 4):
        return Leaf("pixels", shape, encoding.replace("none", "varint"))
    return Leaf(dtype.name if encoding == "none" and len(known) == len(shape) else "other", shape)


def once_of(folder: Path) -> list[str]:
    """What the dataset in `folder` says once per episode, beside its steps."""
    return [name for name in _info(folder).features if name != "steps"]


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
        KeyError: there is nothing at `language`.
        ValueError: it is no text.
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
                texts = texts_of(self._steps(record), language)
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


def texts_of(steps: Mapping[str, Any], path: str) -> list[str]:
    """The text of each step at a path; of several texts in a step, the first one that is not blank.

    Raises:
        KeyError: there is nothing at the path.
        ValueError: it is no text.
    """
    leaf = leaf_of(steps, path)
    if leaf.dtype.kind not in "OSU":
        raise ValueError(f"{path} is {leaf.dtype}, no text")
    rows = leaf.reshape(len(leaf), -1).tolist() if len(leaf) else []
    given = [[one.decode("utf-8", "replace") for one in row] for row in rows]
    return [next((text for text in row if text.strip()), "") for row in given]


def _info(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.WARNING)  # otherwise tfds logs every folder that it opens
    return tfds.builder_from_directory(str(folder)).info


def _scan(path: Path) -> Iterator[tuple[int, bytes]]:
    for start, record in scan_array_record(path) if is_array_record(path.name) else scan(path):
        if isinstance(record, BadShardError):
            raise record
        yield start, record
