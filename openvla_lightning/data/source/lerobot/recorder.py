"""Records a policy's observations and actions, stores each episode when it ends, and writes a LeRobot dataset."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.source.lerobot.metadata import INFO, Feature
from openvla_lightning.data.source.lerobot.writer import Recording, png, write_lerobot
from openvla_lightning.runtime.files import alone, delete, writable, write_json, written_whole

KEPT = "episodes"
"""Folder of the recorded episodes; without it, no episode can be added to the dataset."""
RECORDED = "meta/recorded.json"
IMAGES, STATE, SUCCESS, DONE = "observation.images.", "observation.state", "next.success", "next.done"
TRAIN, FAILED = "train", "failure"
"""Splits: episodes that succeeded or were not judged, and episodes that failed."""


@dataclass(frozen=True)
class Taken:
    """One episode: the observation and the executed action at each of T steps.

    Attributes:
        pictures: camera -> T pictures, uint8 [H, W, 3].
        actions: [T, D], in the world's units.
        instruction: the policy's instruction.
        fps: steps per second.
        state: [T, P], the robot's state; None if it is not known.
        success: whether the episode succeeded; None if it was not judged.
    """

    pictures: Mapping[str, Sequence[NDArray[np.uint8]]]
    actions: NDArray[Any]
    instruction: str
    fps: float
    state: NDArray[Any] | None = None
    success: bool | None = None


class Recorder:
    """Stores complete episodes in `folder/episodes`, and writes the dataset from them.

    Pictures are stored without loss until the dataset is written; its videos are h264. The columns are `action` and
    `observation.state` float32, `observation.images.<camera>`, `next.success` and `next.done`. Failures come after
    the successes in a separate split, `failure`, so that training reads only the successes.

    Args:
        folder: folder of the dataset; created if absent.
        failures: whether to keep failed episodes, too.

    Raises:
        ValueError: the folder holds a dataset that was not made by a `Recorder`, or nothing can be written there.
    """

    def __init__(self, folder: str | Path, failures: bool = True) -> None:
        self.folder, self.failures = Path(folder), failures
        if (self.folder / INFO).exists() and not (self.folder / RECORDED).exists():
            raise ValueError(f"{folder} holds a dataset that was not recorded; choose an empty folder to record into")
        if not writable(self.folder):  # otherwise found when the first episode ends, and again after each one
            raise ValueError(f"nothing can be written to {folder}; choose another folder to record into")

    def add(self, name: str, taken: Taken) -> None:
        """Store an episode under a unique name; it replaces an older one of the same name."""
        if not len(taken.actions) or (taken.success is False and not self.failures):
            return
        arrays: dict[str, NDArray[Any]] = {"actions": np.asarray(taken.actions, np.float32)}
        if taken.state is not None:
            arrays["state"] = np.asarray(taken.state, np.float32)
        for camera, shown in taken.pictures.items():
            packed = [np.frombuffer(png(one), np.uint8) for one in shown]
            arrays[f"picture {camera}"] = np.concatenate(packed)
            arrays[f"ends {camera}"] = np.cumsum([len(one) for one in packed])
            arrays[f"shape {camera}"] = np.array(shown[0].shape)
        told = {"instruction": taken.instruction, "fps": taken.fps, "success": taken.success}
        arrays["told"] = np.array(json.dumps(told))
        with written_whole(self.folder / KEPT / f"{name}.npz") as beside, beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def write(self, *, progress: bool = True) -> Path | None:
        """Write the dataset of all stored episodes, or resume an interrupted call. None: there are no episodes.

        While another process writes it, the call waits, and then adds what was stored since.
        """
        with alone(self.folder / ".recording.lock", f"writing the recording {self.folder}"):
            return self._write(progress)

    def _write(self, progress: bool) -> Path | None:
        kept = {path: _told(path) for path in sorted((self.folder / KEPT).glob("*.npz"))}
        if not self.failures:
            kept = {path: told for path, told in kept.items() if told["success"] is not False}
        if not kept:
            return None
        order = sorted(kept, key=lambda path: kept[path]["success"] is False)
        names = [path.stem for path in order]
        recorded = self.folder / RECORDED
        if not recorded.exists() or json.loads(recorded.read_text(encoding="utf-8")) != names:
            for part in (INFO, "meta", "data", "videos"):  # first what makes it a dataset
                delete(self.folder / part)
            write_json(recorded, names)
        failed = sum(told["success"] is False for told in kept.values())
        sizes = {TRAIN: (0, len(order) - failed), FAILED: (len(order) - failed, len(order))}
        return write_lerobot(
            self.folder,
            _features(order[0]),
            [kept[path]["length"] for path in order],
            list(dict.fromkeys(kept[path]["instruction"] for path in order)),
            _Kept(order),
            fps=kept[order[0]]["fps"],
            splits={name: place for name, place in sizes.items() if place[0] < place[1]},
            progress=progress,
        )


class _Kept:
    """Maps an episode's number to its stored recording; picklable."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __call__(self, number: int) -> Recording:
        told, arrays = _told(self.paths[number]), np.load(self.paths[number])
        length = told["length"]
        last = np.arange(length) == length - 1
        columns: dict[str, NDArray[Any]] = {"action": arrays["actions"], DONE: last}
        columns[SUCCESS] = last & (told["success"] is True)
        if "state" in arrays:
            columns[STATE] = arrays["state"]
        pictures = {}
        for camera in _cameras(arrays):
            ends, packed = arrays[f"ends {camera}"], arrays[f"picture {camera}"]
            starts = [0, *ends[:-1]]
            pictures[IMAGES + camera] = [packed[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]
        return Recording(columns, pictures, [told["instruction"]] * length)


def _cameras(arrays: Any) -> list[str]:
    return [name.removeprefix("picture ") for name in arrays if name.startswith("picture ")]


def _told(path: Path) -> dict[str, Any]:
    arrays = np.load(path)
    return {**json.loads(str(arrays["told"])), "length": len(arrays["actions"])}


def _features(path: Path) -> dict[str, Feature]:
    arrays = np.load(path)
    shapes = {camera: tuple(map(int, arrays[f"shape {camera}"])) for camera in _cameras(arrays)}
    found = {IMAGES + camera: Feature("video", shape) for camera, shape in shapes.items()}
    if "state" in arrays:
        found[STATE] = Feature("float32", (arrays["state"].shape[1],))
    found["action"] = Feature("float32", (arrays["actions"].shape[1],))
    return found | {SUCCESS: Feature("bool", (1,)), DONE: Feature("bool", (1,))}
