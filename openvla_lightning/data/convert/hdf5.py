"""HDF5 in the layouts of robomimic, LIBERO and ALOHA -> RLDS."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from openvla_lightning.runtime.files import below, pointer

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
        found: dict[str, Any] = {}
        with _opened(demo.path) as file:
            for name, (data, leaf) in _layout(file[demo.group] if demo.group else file)[1].items():
                if leaf.kind != "image":
                    found[name] = as_stored(data[:])
                elif data.ndim == 2:
                    found[name] = [self._turn(decode(row.tobytes())) for row in data[:]]
                else:
                    found[name] = [self._turn(image) for image in data[:]]
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
        ValueError: a file has another layout, a demonstration holds other data than the first one, or there is no
            instruction. All files are looked through before anything is written.
        ConversionError: the written data differs from the source.
    """
    paths = (
        sorted(path for ending in ("*.hdf5", "*.h5") for path in below(source, ending)) if source.is_dir() else [source]
    )
    if not paths or not paths[0].exists():
        raise FileNotFoundError(f"{source} holds no .hdf5 file")
    demos, leaves = _surveyed([demo for path in paths for demo in _demos(path, language)], say)
    recorded = Recorded(demos, turned)
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


def _surveyed(demos: Sequence[Demo], say: Callable[[str], None]) -> tuple[list[Demo], dict[str, Leaf]]:
    """The demonstrations that have a step, and what a step of all of them holds; `say` is told what is left out."""
    kept: list[Demo] = []
    leaves: dict[str, Leaf] = {}
    left: dict[str, str] = {}
    for demo in demos:
        with _opened(demo.path) as file:
            steps, found, out = _layout(file[demo.group] if demo.group else file)
            left = out | left
            left |= {key: "beside `data`" for key in file if demo.group and key != "data"}
            own = {name: leaf for name, (_, leaf) in found.items()}
        if not steps:
            continue
        leaves = leaves or own
        kept.append(demo)
        for name in sorted(own.keys() | leaves.keys()):
            if own.get(name) != leaves.get(name):
                both = own.get(name), leaves.get(name)
                here, first = ("not there" if leaf is None else f"{leaf.kind} {list(leaf.shape)}" for leaf in both)
                raise ValueError(
                    f"{demo.path} {demo.group}: {name} is {here}, and {first} in the first demonstration "
                    f"({kept[0].path} {kept[0].group}): convert them into datasets of their own"
                )
    if not kept:
        raise ValueError(f"{demos[0].path}: none of the {len(demos):,} demonstrations has a step")
    if len(kept) < len(demos):
        say(f"left out, as they have no step: {len(demos) - len(kept):,} demonstrations")
    if left:
        say(f"left out: {', '.join(f'{path} ({why})' for path, why in left.items())}")
    return kept, leaves


def _layout(root: Any) -> tuple[int, dict[str, tuple[Any, Leaf]], dict[str, str]]:
    """A demonstration: its steps; name in an RLDS step -> the data and its leaf; and path -> why it is left out."""
    action = "actions" if "actions" in root else "action"
    if action not in root:
        raise KeyError(f"{root.name} holds no actions, only {', '.join(root)}")
    steps = len(root[action])
    found: dict[str, tuple[Any, Leaf]] = {}
    left: dict[str, str] = {}
    for path, data in _datasets(root):
        name = _name(path, action)
        is_jpeg = data.dtype == np.uint8 and data.ndim == 2 and path.split("/")[-2:-1] == ["images"]
        if path.startswith("next_obs/"):
            left["next_obs"] = "a copy of `obs`, one step later"
        elif data.shape[:1] != (steps,):
            left[path] = f"{list(data.shape)} for {steps} actions"
        elif name in found or name in (LANGUAGE, *FLAGS):
            left[path] = f"a step has another {name}"
        elif is_jpeg or (data.dtype == np.uint8 and data.ndim == 4 and data.shape[-1] == 3):
            found[name] = data, Leaf("image", (None, None, 3))
        elif data.dtype.kind in "fiub":
            found[name] = data, Leaf(as_stored(np.empty(0, data.dtype)).dtype.name, data.shape[1:])
        else:
            left[path] = "no numbers"
    return steps, found, left


def _demos(path: Path, language: str | None) -> Iterator[Demo]:
    with _opened(path) as file:
        words = language or _words(file.get("data")) or _words(file) or _from_name(path)
        if "data" in file and any(name.startswith("demo") for name in file["data"]):
            groups = [f"data/{name}" for name in sorted(file["data"], key=_by_number) if name.startswith("demo")]
        elif "action" in file and "observations" in file:
            groups = [""]
        else:
            raise ValueError(
                f"{path} holds {', '.join(file)}: neither data/demo_<n> (robomimic, LIBERO) nor action and "
                "observations (ALOHA)"
            )
        for group in groups:
            own = language or (_words(file[group]) if group else None) or words
            if own is None:
                raise ValueError(f"{path} {group} does not say what the robot was told: give it with --language")
            yield Demo(path, group, own)


def _by_number(name: str) -> list[int | str]:
    """What to sort by, so that `demo_2` comes before `demo_10`, and `demo_2_again` between them."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _words(group: Any) -> str | None:
    """The instruction in the attributes of a file or of one demonstration (RoboCasa: `lang` in `ep_meta`)."""
    attributes = {} if group is None else dict(group.attrs)
    said = [attributes.get(key) for key in ("language_instruction", "language", "instruction")]
    for key, name in (("problem_info", "language_instruction"), ("ep_meta", "lang")):
        with suppress(ValueError):
            described = json.loads(_text(attributes.get(key, "null")))
            said.append(described.get(name) if isinstance(described, dict) else None)
    return next((text for one in said if one is not None and (text := _text(one).strip().strip('"'))), None)


def _text(value: Any) -> str:
    """A text from a text or a list: of letters, as in LIBERO, or of instructions, of which the first one counts."""
    texts = [one.decode() if isinstance(one, bytes) else str(one) for one in np.ravel(value).tolist()]
    return "".join(texts) if all(len(text) == 1 for text in texts) else next(filter(str.strip, texts), "")


def _from_name(path: Path) -> str | None:
    if not path.stem.endswith("_demo"):
        return None
    return SCENE.sub("", path.stem.removesuffix("_demo")).replace("_", " ")


def _datasets(root: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, node in root.items():
        if hasattr(node, "shape"):
            yield f"{prefix}{key}", node
        else:
            yield from _datasets(node, f"{prefix}{key}/")


def _name(path: str, action: str) -> str:
    if path == action:
        return "action"
    for prefix in ("observations/images/", "observations/", "obs/"):
        if path.startswith(prefix):
            return f"observation/{path.removeprefix(prefix)}"
    return path
