"""The pass over a dataset's files, which extracts all data except pixels, and the places of the pixels."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import problem_of
from openvla_lightning.data.oxe.leaves import leaf_at
from openvla_lightning.data.oxe.registry import action_paths
from openvla_lightning.data.oxe.spec import DatasetSpec, Trajectory
from openvla_lightning.data.source.faults import MISNAMED, OWN, WAY_OUT, BadShardError, BadTrajectories, way_out
from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.rlds.array_records import is_array_record, scan_array_record
from openvla_lightning.data.source.rlds.arrays import Layout, layout_of, observation_features
from openvla_lightning.data.source.rlds.records import scan
from openvla_lightning.data.source.words import instructions_of, numbered

OTHER_WIDTH = "its action has {} and its state {} numbers, those of {} {} and {}"


@dataclass(frozen=True)
class Job:
    """One file to read.

    Attributes:
        path: the file.
        split: the split it belongs to.
        expected: trajectories in it according to dataset_info.json.
        features: the dataset's features in tfds's JSON.
        spec: the dataset's description.
        bad_trajectories: whether an unreadable trajectory is an error or left out.
        check_images: decode every image instead of checking only its first and last bytes.
    """

    path: Path
    split: str
    expected: int
    features: str
    spec: DatasetSpec
    bad_trajectories: BadTrajectories = "error"
    check_images: bool = False


@dataclass
class Shard:
    """The contents of one file, from `read_shard`, trajectory by trajectory; `skipped` is as in `Index`."""

    split: str
    lengths: list[int] = field(default_factory=list)
    action: list[NDArray[np.float32]] = field(default_factory=list)
    proprio: list[NDArray[np.float32]] = field(default_factory=list)
    instruction: list[NDArray[Any]] = field(default_factory=list)
    images: dict[str, list[NDArray[np.int64]]] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)


def read_shard(job: Job) -> Shard:
    """Read every trajectory of one file.

    Raises:
        BadShardError: a trajectory cannot be read and `bad_trajectories` is `error` (the message has file, trajectory
            and reason), or the number of trajectories differs from dataset_info.json.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeatureConnector.from_json(json.loads(job.features))
    skip = {"steps": tfds.decode.SkipDecoding()}
    shard = Shard(job.split, images={role: [] for role in job.spec.cameras})

    def leave_out(trajectory: int, reason: str) -> None:
        shard.skipped.append({"file": job.path.name, "trajectory": trajectory, "reason": reason})

    layouts = image_layouts(job.spec, job.features)
    records = scan_array_record(job.path) if is_array_record(job.path.name) else scan(job.path)
    number, lost = -1, "the file ends before it"
    for number, (start, record) in enumerate(records):
        if isinstance(record, BadShardError):
            if job.bad_trajectories == "error":
                raise BadShardError(f"{record} {WAY_OUT}.")
            lost = f"lost with the one before: {record}"
            leave_out(number, str(record))
            continue
        try:
            episode = features.deserialize_example_np(record, decoders=skip)
            _add(shard, job, _with_metadata(episode), record, start, layouts)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            reason = str(error.args[0] if error.args else error)
            if job.bad_trajectories == "error":
                where = f"{job.spec.name}: {job.path}, trajectory {number}"
                raise BadShardError(f"{where}: {reason}. {way_out(error, job.spec.name)}.") from error
            leave_out(number, reason)
    found = number + 1
    if found > job.expected or (found < job.expected and job.bad_trajectories == "error"):
        raise BadShardError(f"{job.path} holds {found} trajectories, dataset_info.json says {job.expected}. {WAY_OUT}.")
    for trajectory in range(found, job.expected):
        leave_out(trajectory, lost)
    return shard


def image_layouts(spec: DatasetSpec, features: str) -> dict[str, Layout]:
    """Role -> layout of its images, for those that are stored as plain numbers.

    Raises:
        BadShardError: a camera's key is no image.
    """
    observation, found = observation_features(json.loads(features)), {}
    for role, key in spec.cameras.items():
        if key is not None and key in observation:
            try:
                layout = layout_of(observation[key], key)
            except ValueError as error:
                raise BadShardError(f"{spec.name}: {error}. {MISNAMED.format(name=spec.name)}.") from error
            if layout is not None:
                found[role] = layout
    return found


def _with_metadata(episode: dict[str, Any]) -> Trajectory:
    """The steps, with the episode's metadata repeated for each step under `traj_metadata`, as released."""
    steps = dict(episode["steps"])
    length = next((len(leaf) for leaf in _leaves(steps)), 0)
    once = {key: value for key, value in episode.items() if key != "steps"}
    return steps | {"traj_metadata": _repeated(once, length)} if once else steps


def _leaves(node: dict[str, Any]) -> Any:
    for child in node.values():
        yield from _leaves(child) if isinstance(child, dict) else [child]


def _repeated(node: Any, length: int) -> Any:
    if isinstance(node, dict):
        return {key: _repeated(child, length) for key, child in node.items()}
    value = np.asarray(node, object) if isinstance(node, bytes | str) else np.asarray(node)
    return np.broadcast_to(value, (length, *value.shape))


def _add(shard: Shard, job: Job, raw: Trajectory, record: bytes, start: int, layouts: dict[str, Layout]) -> None:
    spec = job.spec
    seen = dict(leaf_at(raw, "observation"))
    for role, camera in spec.cameras.items():
        if camera is None:
            continue
        images = leaf_at(raw, f"observation/{camera}")
        layout = layouts.get(role)
        if layout is None:
            _check_images(images, camera, every_pixel=job.check_images)
        if layout is not None and layout.stored == "varint":
            seen[camera] = layout.spans(record, start, f"steps/observation/{camera}", len(images))
        else:
            seen[camera] = _places(images, record, start)
    trajectory = spec.transformed(raw | {"observation": seen})
    action = np.asarray(leaf_at(trajectory, "action"), np.float32)
    if action.ndim != 2:
        raise ValueError(f"an action is not a finite vector (shape {list(action.shape)})")
    if len(bad := np.flatnonzero(~np.isfinite(action).all(axis=1))):
        raise ValueError(f"an action is not a finite vector (step {bad[0]}: {action[bad[0]].tolist()})")
    steps = len(action)
    if steps:
        spec.check_width(action.shape[1])
    instruction = instructions_of(trajectory, spec.language, steps)
    columns = [_state(trajectory, key, steps) for key in spec.state]
    places = {
        role: np.zeros((steps, 2), np.int64) if key is None else trajectory["observation"][key]
        for role, key in spec.cameras.items()
    }
    for role, found in places.items():
        if len(found) != steps:
            raise ValueError(f"there are {steps} actions and {len(found)} images of {spec.cameras[role]}")
    proprio = np.concatenate([np.zeros((steps, 0), np.float32), *columns], axis=1)
    known = ((one.shape[1], other.shape[1]) for one, other in zip(shard.action, shard.proprio, strict=True) if len(one))
    width = action.shape[1], proprio.shape[1]
    if steps and (usual := next(known, width)) != width:
        raise ValueError(OTHER_WIDTH.format(*width, "the one before it", *usual))
    # an unreadable trajectory raised before this line, so no part of it is added
    shard.lengths.append(steps)
    shard.action.append(action)
    shard.instruction.append(instruction)
    shard.proprio.append(proprio)
    for role, found in places.items():
        shard.images[role].append(found)


def _check_images(images: NDArray[Any], camera: str, *, every_pixel: bool) -> None:
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OSU":
        raise ValueError(f"observation/{camera} is {images.dtype} {list(images.shape[1:])}, which is no encoded image")
    for step, image in enumerate(images):
        if image and (problem := problem_of(image, every_pixel)):  # where no image is stored, it is black
            raise ValueError(f"observation/{camera} of step {step} {problem}")


def _state(trajectory: Trajectory, key: str | None, steps: int) -> NDArray[np.float32]:
    if key is None:
        return np.zeros((steps, 1), np.float32)
    state = np.asarray(leaf_at(trajectory, f"observation/{key}"), np.float32)
    if len(state) != steps:
        raise ValueError(f"there are {steps} actions and {len(state)} entries of observation/{key}")
    state = state.reshape(steps, -1) if steps else np.zeros((0, int(np.prod(state.shape[1:]))), np.float32)
    if len(bad := np.flatnonzero(~np.isfinite(state).all(axis=1))):
        raise ValueError(f"observation/{key} of step {bad[0]} is not finite: {state[bad[0]].tolist()}")
    return state


def _places(images: NDArray[Any], record: bytes, start: int) -> NDArray[np.int64]:
    """Offset in the file and length of each encoded image. If equal bytes occur several times, any place is correct."""
    places = np.zeros((len(images), 2), np.int64)
    cursor = 0
    for i, image in enumerate(images):
        if image:
            found = record.find(image, cursor)
            cursor = (found if found >= 0 else record.index(image)) + len(image)
            places[i] = start + cursor - len(image), len(image)
    return places


def make_alike(shards: list[Shard], jobs: Sequence[Job]) -> None:
    """Leave out trajectories whose actions or states have another width than those of most; see `bad_trajectories`.

    Raises:
        BadShardError: there is one, and `bad_trajectories` is `error`; the message has its file and number.
    """
    pairs = (pair for shard in shards for pair in zip(shard.action, shard.proprio, strict=True))
    counts = Counter((action.shape[1], state.shape[1]) for action, state in pairs if len(action))
    if not counts:
        return
    usual = counts.most_common(1)[0][0]
    for shard, job in zip(shards, jobs, strict=True):
        lost = {one["trajectory"] for one in shard.skipped}
        numbers = [number for number in range(len(lost) + len(shard.lengths)) if number not in lost]
        for place in reversed(range(len(shard.lengths))):
            width = shard.action[place].shape[1], shard.proprio[place].shape[1]
            if not shard.lengths[place]:
                shard.action[place], shard.proprio[place] = (np.zeros((0, one), np.float32) for one in usual)
            elif width != usual:
                reason = OTHER_WIDTH.format(*width, "most trajectories", *usual)
                if job.bad_trajectories == "error":
                    where = f"{job.spec.name}: {job.path}, trajectory {numbers[place]}"
                    raise BadShardError(f"{where}: {reason}. {OWN if action_paths(job.spec) is None else WAY_OUT}.")
                shard.skipped.append({"file": job.path.name, "trajectory": numbers[place], "reason": reason})
                every: list[list[Any]] = [shard.lengths, shard.action, shard.proprio, shard.instruction]
                for parts in [*every, *shard.images.values()]:
                    del parts[place]


def join(shards: list[Shard], files: dict[str, int], splits: list[str], cameras: list[str]) -> Index:
    """Join the shards of a dataset; `files`, name -> bytes, are in the order of `shards`; `cameras` are the roles."""

    def stacked(name: str) -> NDArray[Any]:
        return np.concatenate([part for shard in shards for part in getattr(shard, name)])

    instruction, words = numbered(part for shard in shards for part in shard.instruction)
    images = {}
    for role in cameras:
        parts = [(np.full((len(part), 1), i), part) for i, shard in enumerate(shards) for part in shard.images[role]]
        images[role] = np.concatenate([np.concatenate(pair, axis=1) for pair in parts])
    return Index(
        action=stacked("action"),
        proprio=stacked("proprio"),
        bounds=np.cumsum([0, *(length for shard in shards for length in shard.lengths)]),
        split=np.array([splits.index(shard.split) for shard in shards for _ in shard.lengths], np.int16),
        instruction=instruction,
        images=images,
        splits=tuple(splits),
        instructions=tuple(word.decode("utf-8", "replace") for word in words),
        files=tuple(files),
        shards=np.cumsum([0, *(sum(shard.lengths) for shard in shards)]),
        skipped=tuple(one for shard in shards for one in shard.skipped),
        sizes=np.array([*files.values()], np.int64),
    )
