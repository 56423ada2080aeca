"""Whole trajectories as they were recorded, for looking at and for replaying."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openvla_lightning.data.source.array_records import is_array_record, scan_array_record
from openvla_lightning.data.source.records import BadShardError, scan


def read_episodes(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the trajectories of a split of the dataset in `folder`, before any standardisation.

    Each holds what its features say, among it `steps`, a dictionary of arrays [T, ...] with images still encoded.

    Raises:
        ValueError: the dataset has no such split.
        BadShardError: a record is damaged.
    """
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.WARNING)  # or tfds reports every folder it opens
    info = tfds.builder_from_directory(str(folder)).info
    if split not in info.splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(info.splits)}")
    for path in map(Path, info.splits[split].filepaths):
        for _, record in scan_array_record(path) if is_array_record(path.name) else scan(path):
            if isinstance(record, BadShardError):
                raise record
            yield info.features.deserialize_example_np(record, decoders={"steps": tfds.decode.SkipDecoding()})
