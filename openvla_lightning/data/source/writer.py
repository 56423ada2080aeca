"""Write RLDS datasets (TFDS folders of TFRecord shards) without TensorFlow.

`tfds.builder_from_directory(folder)` reads the result, so a dataset made here and one downloaded from
Open X-Embodiment go through the same reader.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from openvla_lightning.data.images import encode
from openvla_lightning.data.source.processes import count, run_jobs
from openvla_lightning.data.source.rlds.records import frame
from openvla_lightning.runtime.files import ENDING, alone, delete, write_json, written_whole
from openvla_lightning.runtime.progress import Bar

PLAN = "generation.json"

Episode = Callable[[str, int], dict[str, Any]]


@dataclass(frozen=True)
class PlannedShard:
    """Episodes [first, first + length) of a split, for one file."""

    path: Path
    split: str
    first: int
    length: int


def write_rlds(
    folder: str | Path,
    features: Any,
    splits: dict[str, int],
    episode: Episode,
    *,
    episodes_per_shard: int = 64,
    workers: int | None = None,
    recipe: dict[str, Any] | None = None,
    description: str = "",
    progress: bool = True,
) -> Path:
    """Write an RLDS dataset into `folder`, shard by shard and in parallel; resume an interrupted run.

    A shard gets its final name when it is complete, and `dataset_info.json` is written when all shards are there.
    For a finished dataset, a call with the same arguments returns at once. While another process writes it, the call
    waits for that process.

    Args:
        folder: `<root>/<dataset name>/<version>`, for instance `data/tabletop/1.0.0`.
        features: `tfds.features.FeaturesDict` with a `steps` entry of `tfds.features.Dataset`.
        splits: split name -> number of episodes, for instance `{"train": 400, "val": 40}`.
        episode: a picklable `(split, index) -> example` that depends only on its arguments. Images may be uint8 arrays
            [H, W, 3] (they become JPEGs, quality 95, no chroma subsampling) or encoded bytes; `steps` is
            a list of dicts or one dict of stacked arrays.
        episodes_per_shard: episodes in one file; an interruption loses at most this many per worker.
        workers: processes (spawned); 0 stays in this process; default: one per core.
        recipe: arguments of `episode` as JSON data (seed, noise, ...), stored in `generation.json`.
        description: text for `dataset_info.json`.
        progress: show a bar with rate and time left.

    Returns:
        `folder` as a Path.

    Raises:
        ValueError: the folder holds a dataset made with other arguments, a split or a file would be empty, or an
            episode cannot be written (the message has its number).
    """
    folder = Path(folder)
    empty = [name for name, count in splits.items() if count < 1]
    if empty or not splits:
        raise ValueError(f"every split needs at least one episode; got splits={splits}")
    if episodes_per_shard < 1:
        raise ValueError(f"every file needs at least one episode; got episodes_per_shard={episodes_per_shard}")
    feature_json = json.loads(json.dumps(features.to_json()))
    plan = {
        "splits": splits,
        "episodes_per_shard": episodes_per_shard,
        "recipe": recipe or {},
        "features": feature_json,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".writing.lock", f"writing {folder}"):
        _agree_on_plan(folder, json.loads(json.dumps(plan)))
        shards = _shards(folder, splits, episodes_per_shard)
        if not (folder / "dataset_info.json").exists():
            _write_shards(shards, feature_json, episode, workers, progress)
            _write_metadata(folder, features, shards, description)
    return folder


def _agree_on_plan(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / PLAN
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in plan if found.get(key) != plan[key]]
        if changed:
            raise ValueError(
                f"{folder} holds a dataset (or part of one) that was made with other {', '.join(changed)}. "
                f"Delete the folder to make it anew, or write to another one."
            )
    elif any(folder.glob("*.tfrecord*")):
        raise ValueError(f"{folder} holds tfrecord files that were not written by write_rlds; choose an empty folder.")
    else:
        write_json(path, plan)
    for left in folder.glob(f".*{ENDING}"):  # from a killed run
        delete(left)


def _name_and_version(folder: Path) -> tuple[str, str]:
    parts = folder.resolve().parts
    if parts[-1].count(".") == 2 and parts[-1].replace(".", "").isdigit():
        return parts[-2], parts[-1]
    return parts[-1], "1.0.0"


def _shards(folder: Path, splits: dict[str, int], per_shard: int) -> list[PlannedShard]:
    name, _ = _name_and_version(folder)
    shards = []
    for split, episodes in splits.items():
        total = -(-episodes // per_shard)
        for i in range(total):
            path = folder / f"{name}-{split}.tfrecord-{i:05d}-of-{total:05d}"
            shards.append(PlannedShard(path, split, i * per_shard, min(per_shard, episodes - i * per_shard)))
    return shards


def _write_shards(
    shards: list[PlannedShard], features: Any, episode: Episode, workers: int | None, progress: bool
) -> None:
    missing = [shard for shard in shards if not shard.path.exists()]
    if not missing:
        return
    workers = min((os.cpu_count() or 1) if workers is None else workers, len(missing))
    total, done = (sum(shard.length for shard in part) for part in (shards, [s for s in shards if s not in missing]))
    label = "/".join(missing[0].path.parent.parts[-2:])
    with Bar(label, total, "episodes", done=done, visible=progress) as bar:
        if workers == 0:
            for shard in missing:
                _write_shard(shard, features, episode, bar.advance)
            return
        run_jobs(_write_shard, ((shard, features, episode) for shard in missing), workers, bar, done)


def _write_shard(shard: PlannedShard, features: Any, episode: Episode, advance: Callable[[], Any] = count) -> None:
    feature, serializer = _features_from(json.dumps(features))
    with written_whole(shard.path) as beside, beside.open("wb") as file:
        for index in range(shard.first, shard.first + shard.length):
            try:
                made = episode(shard.split, index)
            except ValueError as error:
                raise ValueError(f"episode {index} of {shard.split}: {error}") from error
            try:
                example = serializer.get_tf_example(feature.encode_example(encode_images(feature, made)))
            except (ValueError, TypeError, KeyError, RuntimeError) as error:  # the last one: tfds misses a key
                raise ValueError(f"episode {index} of {shard.split}: {error}") from error
            # deterministic: the same episodes give the same files in every process
            file.write(frame(example.SerializeToString(deterministic=True)))
            advance()


@cache
def _features_from(feature_json: str) -> tuple[Any, Any]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    feature = tfds.features.FeatureConnector.from_json(json.loads(feature_json))
    return feature, ExampleSerializer(feature.get_serialized_info())


def encode_images(feature: Any, value: Any, path: str = "") -> Any:
    """Turn every uint8 array under a `tfds.features.Image` into JPEG bytes (tfds's own encoder needs TensorFlow).

    Raises:
        ValueError: a value is neither; the message has its place, which begins with `path`, and the expected form.
    """
    import tensorflow_datasets as tfds

    def inner(child: Any, item: Any, key: str | int) -> Any:
        return encode_images(child, item, f"{path}/{key}".lstrip("/"))

    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: inner(feature[key], item, key) if key in feature else item for key, item in value.items()}
    if isinstance(feature, tfds.features.Dataset):
        if isinstance(value, dict):
            return encode_images(feature.feature, value, path)
        return [inner(feature.feature, item, step) for step, item in enumerate(value)]
    if isinstance(feature, tfds.features.Image):
        many = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 4)
        return [_jpeg(image, f"{path}/{i}") for i, image in enumerate(value)] if many else _jpeg(value, path)
    return value


def _jpeg(image: np.ndarray | bytes, path: str) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{path} is {found}; an image is a uint8 array [H, W, 3] with values 0..255, or encoded bytes")
    if not image.size:
        raise ValueError(f"{path} is uint8 {list(image.shape)}, an image without pixels; wanted is uint8 [H, W, 3]")
    return encode(image)


def _write_metadata(folder: Path, features: Any, shards: list[PlannedShard], description: str) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    name, version = _name_and_version(folder)
    identity = DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=description or name)
    info.set_file_format("tfrecord")
    template = tfds.core.ShardedFileTemplate(dataset_name=name, data_dir=folder, filetype_suffix="tfrecord")
    split_infos = []
    for split in dict.fromkeys(shard.split for shard in shards):
        own = [shard for shard in shards if shard.split == split]
        num_bytes = sum(shard.path.stat().st_size - 16 * shard.length for shard in own)
        lengths = [shard.length for shard in own]
        split_infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
        )
    info.set_splits(tfds.core.splits.SplitDict(split_infos))
    with TemporaryDirectory(dir=folder, prefix=".metadata.") as temporary:
        info.write_to_directory(temporary)
        written = sorted(Path(temporary).iterdir(), key=lambda path: path.name == "dataset_info.json")
        for path in written:  # dataset_info.json last: it marks the dataset as complete
            path.replace(folder / path.name)
