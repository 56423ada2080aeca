"""HDF5 in the layouts of robomimic, LIBERO and ALOHA -> RLDS."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.convert.lerobot import FLAGS, LANGUAGE, as_stored, nested
from openvla_lightning.data.convert.verification import Columns, Verified, compare, texts
from openvla_lightning.data.images import Pixels, decode
from openvla_lightning.data.source.rlds.episodes import Episodes, Leaf, declare, leaf_of
from openvla_lightning.data.source.writer import write_rlds
from openvla_lightning.runtime.files import pointer

SCENE = re.compile(r"^[A-Z_]+\d+_")
"""LIBERO's prefix of the instruction in file names such as KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5."""


@dataclass(frozen=True)
class Demo:
    """One episode: a file, the group in it (empty for ALOHA, where the file is the episode), and the instruction."""

    path: Path
    group: str
    words: str


class Recorded:
    """Reads demonstrations; picklable.

    Args:
        demos: all demonstrations.
        turned: turn pictures by 180 degrees, because LIBERO stores them upside down.
    """

    def __init__(self, demos: Sequence[Demo], turned: bool) -> None:
        self.demos, self.turned = demos, turned

    def leaves(self, number: int) -> dict[str, NDArray[Any] | list[Any]]:
        """Path in an RLDS step -> values [T, ...] of everything with as many entries as there are actions."""
        demo = self.demos[number]
        with _opened(demo.path) as file:
            root = file[demo.group] if demo.group else file
            action = "actions" if "actions" in root else "action"
            steps = len(root[action])
            found: dict[str, Any] = {}
            for path, data in _datasets(root):
                if data.shape[:1] != (steps,):
                    continue
                name = _name(path, action)
                is_jpeg = data.dtype == np.uint8 and data.ndim == 2 and path.split("/")[-2:-1] == ["images"]
                if is_jpeg:
                    found[name] = [self._turn(decode(row.tobytes())) for row in data[:]]
                elif data.dtype == np.uint8 and data.ndim == 4 and data.shape[-1] == 3:
                    found[name] = [self._turn(image) for image in data[:]]
                elif data.dtype.kind in "fiub":
                    found[name] = as_stored(data[:])
        return found

    def _turn(self, image: Pixels) -> Pixels:
        return np.ascontiguousarray(image[::-1, ::-1]) if self.turned else image

    def __call__(self, split: str, number: int) -> dict[str, Any]:
        """An episode in the form that `write_rlds` takes."""
        leaves = self.leaves(number)
        steps = len(leaves["action"])
        flags = np.zeros((3, steps), bool)
        flags[0, 0] = flags[1, -1] = flags[2, -1] = True
        every: dict[str, Any] = {**leaves, LANGUAGE: [self.demos[number].words] * steps}
        every |= dict(zip(FLAGS, flags, strict=True))
        return {"steps": [nested({path: leaf[step] for path, leaf in every.items()}) for step in range(steps)]}


def to_rlds(
    source: Path,
    target: Path,
    *,
    language: str | None = None,
    turned: bool = False,
    episodes_per_shard: int = 64,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> Verified:
    """Convert a file or a folder of files, with all data that has one entry per action.

    In robomimic's and LIBERO's files, every `data/demo_<n>` is an episode and `obs/<key>` becomes `observation/<key>`.
    In ALOHA's, every file is an episode, `observations/images/<camera>` becomes `observation/<camera>` and
    `observations/qpos` becomes `observation/qpos`. `actions` or `action` becomes `action`.

    Args:
        source: the file or folder.
        target: `<name>/<version>` of the new dataset.
        language: the instruction; None: it is read from the files or, as for LIBERO, from their names.
        turned: turn pictures by 180 degrees.
        episodes_per_shard: episodes in one file.
        workers: processes; None: one per core.
        say: called with messages about data that is left out.

    Raises:
        FileNotFoundError: there is no HDF5 file.
        ValueError: a file has another layout, or there is no instruction.
        ConversionError: the written data differs from the source.
    """
    paths = (
        sorted(path for ending in ("*.hdf5", "*.h5") for path in source.rglob(ending)) if source.is_dir() else [source]
    )
    if not paths or not paths[0].exists():
        raise FileNotFoundError(f"{source} holds no .hdf5 file")
    demos = [demo for path in paths for demo in _demos(path, language)]
    recorded = Recorded(demos, turned)
    first = recorded.leaves(0)
    leaves = {path: _leaf(values) for path, values in first.items()}
    leaves |= {LANGUAGE: Leaf("text")} | dict.fromkeys(FLAGS, Leaf("bool"))
    say(f"{len(demos):,} episodes in {len(paths):,} files; a step holds {', '.join(leaves)}")
    write_rlds(
        target,
        declare(leaves),
        {"train": len(demos)},
        recorded,
        episodes_per_shard=episodes_per_shard,
        workers=workers,
        recipe={"converted_from": str(source), "turned": turned},
    )
    return compare(len(demos), _as_read(recorded), _as_written(target, leaves))


def _as_read(recorded: Recorded) -> Any:
    def read(number: int) -> tuple[Columns, Mapping[str, Callable[[int], Pixels]]]:
        leaves = recorded.leaves(number)
        words = {LANGUAGE: texts([recorded.demos[number].words] * len(leaves["action"]))}
        columns = {path: values for path, values in leaves.items() if isinstance(values, np.ndarray)}
        cameras = {path: values for path, values in leaves.items() if isinstance(values, list)}
        return columns | words, {key: lambda step, shown=shown: shown[step] for key, shown in cameras.items()}

    return read


def _as_written(target: Path, leaves: Mapping[str, Leaf]) -> Any:
    episodes = Episodes(target, LANGUAGE)

    def read(number: int) -> tuple[Columns, Mapping[str, Callable[[int], Pixels]]]:
        steps = episodes(number)
        columns: dict[str, NDArray[Any]] = {LANGUAGE: texts(leaf_of(steps, LANGUAGE).tolist())}
        cameras: dict[str, NDArray[Any]] = {}
        for path, leaf in leaves.items():
            if leaf.kind == "image":
                cameras[path] = leaf_of(steps, path)
            elif leaf.kind != "text" and path not in FLAGS:
                columns[path] = leaf_of(steps, path)
        return columns, {key: lambda step, shown=shown: decode(shown[step]) for key, shown in cameras.items()}

    return read


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file that is read from; what is wrong with it is said with its path, which the library does not know.

    Raises:
        ValueError: it is cut short, damaged or no HDF5, or lacks what is asked of it.
    """
    import h5py

    try:
        with h5py.File(path) as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        reason = pointer(path) or (error.args[0] if isinstance(error, KeyError) else error)
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _demos(path: Path, language: str | None) -> Iterator[Demo]:
    with _opened(path) as file:
        words = language or _words(file) or _from_name(path)
        if "data" in file and any(name.startswith("demo") for name in file["data"]):
            names = sorted((name for name in file["data"] if name.startswith("demo")), key=_by_number)
            if words is None:
                raise ValueError(f"{path} does not say what the robot was told: give it with --language")
            yield from (Demo(path, f"data/{name}", words) for name in names)
        elif "action" in file and "observations" in file:
            if words is None:
                raise ValueError(f"{path} does not say what the robot was told: give it with --language")
            yield Demo(path, "", words)
        else:
            raise ValueError(
                f"{path} holds {', '.join(file)}: neither data/demo_<n> (robomimic, LIBERO) nor action and "
                "observations (ALOHA)"
            )


def _by_number(name: str) -> list[int | str]:
    """What to sort by, so that `demo_2` comes before `demo_10`, and `demo_2_again` between them."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _words(file: Any) -> str | None:
    attributes = dict(file.attrs) | (dict(file["data"].attrs) if "data" in file else {})
    for key in ("language_instruction", "language", "instruction"):
        if key in attributes:
            return _text(attributes[key])
    if "problem_info" in attributes:
        said = json.loads(_text(attributes["problem_info"])).get("language_instruction")
        return "".join(said).strip('"') if said else None
    return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _from_name(path: Path) -> str | None:
    if not path.stem.endswith("_demo"):
        return None
    return SCENE.sub("", path.stem.removesuffix("_demo")).replace("_", " ")


def _datasets(root: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, node in root.items():
        if hasattr(node, "shape"):
            yield f"{prefix}{key}", node
        elif key != "next_obs":  # robomimic's copy of `obs`, one step later
            yield from _datasets(node, f"{prefix}{key}/")


def _name(path: str, action: str) -> str:
    if path == action:
        return "action"
    for prefix in ("observations/images/", "observations/", "obs/"):
        if path.startswith(prefix):
            return f"observation/{path.removeprefix(prefix)}"
    return path


def _leaf(values: NDArray[Any] | list[Any]) -> Leaf:
    if isinstance(values, list):
        return Leaf("image", (None, None, 3))
    return Leaf(values.dtype.name, values.shape[1:])
