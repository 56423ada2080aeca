"""The tasks of the tabletop world, their instructions, and when they are done."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np

from openvla_lightning.env.base import Task
from openvla_lightning.env.tabletop.scene import OBJECTS, PLATES, Thing

CUBES, DISHES = ("red cube", "green cube", "blue cube"), ("white plate",)
"""Default objects and plates of a world."""

DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "away": (-1.0, 0.0), "closer": (1.0, 0.0)}
"""Directions of a push as the camera sees them: unit vectors (x, y) on the table."""

PHRASES = {
    "touch": ("touch the {object}", "reach the {object}", "tap the {object}"),
    "push": ("push the {object} {direction}", "slide the {object} {direction}", "move the {object} {direction}"),
    "lift": ("lift the {object}", "pick up the {object}", "raise the {object}"),
    "put": (
        "put the {object} on the {plate}",
        "place the {object} on the {plate}",
        "move the {object} onto the {plate}",
    ),
}
SETS = {"pretraining": ("touch_*", "lift_*"), "new": ("push_*_left", "push_*_right")}
"""Task sets by name: patterns of task names. A policy is pretrained on one and fine-tuned on the other."""

_SPOKEN = {"left": "to the left", "right": "to the right", "away": "away from you", "closer": "towards you"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TabletopTask(Task):
    """One task of the tabletop world.

    Attributes:
        variants: alternative instructions; `instruction` is the first.
        target: the object of the task.
        plate: target plate, for the family `put`.
        direction: direction of the push, for the family `push`: a unit vector (x, y).
    """

    variants: tuple[str, ...]
    target: Thing
    plate: Thing | None = None
    direction: tuple[float, float] | None = None


def _task(family: str, target: Thing, suffix: str = "", plate: Thing | None = None, way: str = "") -> TabletopTask:
    name = f"{family}_{target.body}{suffix}"
    words = {"object": target.name, "plate": plate.name if plate else "", "direction": _SPOKEN.get(way, "")}
    variants = tuple(phrase.format(**words) for phrase in PHRASES[family])
    return TabletopTask(
        name=name,
        family=family,
        instruction=variants[0],
        sets=tuple(key for key, patterns in SETS.items() if any(fnmatch(name, p) for p in patterns)),
        variants=variants,
        target=target,
        plate=plate,
        direction=DIRECTIONS[way] if way else None,
    )


def tasks_of(
    tasks: Iterable[str] = ("*",),
    objects: Iterable[str] = CUBES,
    plates: Iterable[str] = DISHES,
    **options: object,
) -> dict[str, TabletopTask]:
    """All tasks by name of a `Tabletop` with these arguments; nothing is built.

    Raises:
        ValueError: if a name is not in the world.
    """
    return select_tasks(all_tasks(objects, plates), tasks)


def keys_of(wrist_camera: bool = False, **options: object) -> list[str]:
    """The keys of an observation of a `Tabletop` with these arguments; nothing is built."""
    return ["image", "proprio", *["wrist_image"] * wrist_camera]


def all_tasks(objects: Iterable[str] = tuple(OBJECTS), plates: Iterable[str] = tuple(PLATES)) -> list[TabletopTask]:
    """Return every task that these objects and plates allow.

    Raises:
        ValueError: if an object or plate is not in the catalogue.
    """
    objects, plates = list(objects), list(plates)
    if unknown := [name for name in objects if name not in OBJECTS] + [name for name in plates if name not in PLATES]:
        raise ValueError(f"not in the tabletop world: {unknown}; it has {[*OBJECTS, *PLATES]}")
    targets, dishes = [OBJECTS[name] for name in objects], [PLATES[name] for name in plates]
    return [
        *(_task("touch", target) for target in targets),
        *(_task("push", target, f"_{way}", way=way) for target in targets for way in DIRECTIONS),
        *(_task("lift", target) for target in targets),
        *(_task("put", target, f"_on_{dish.body}", plate=dish) for target in targets for dish in dishes),
    ]


def select_tasks(available: Sequence[TabletopTask], patterns: Iterable[str]) -> dict[str, TabletopTask]:
    """Return the tasks that match any of the patterns, by name. A pattern is a task's name (`lift_*`), family or set.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    patterns = list(patterns)
    matches = {p: [t for t in available if any(fnmatch(n, p) for n in (t.name, t.family, *t.sets))] for p in patterns}
    if idle := [pattern for pattern, tasks in matches.items() if not tasks] or ([] if patterns else ["nothing"]):
        raise ValueError(f"no tabletop task is called {idle}; the tasks are {[task.name for task in available]}")
    wanted = {task.name for tasks in matches.values() for task in tasks}
    return {task.name: task for task in available if task.name in wanted}


@dataclass(frozen=True, slots=True)
class Judgement:
    """State of an episode: whether it is over, whether it succeeded, and the completed share of the task, 0 to 1."""

    success: bool = False
    failure: bool = False
    progress: float = 0.0


def judge(
    task: TabletopTask,
    start: dict[str, np.ndarray],
    now: dict[str, np.ndarray],
    touched: set[str],
    tolerance: float = 1.0,
) -> Judgement:
    """Judge an episode.

    Args:
        task: the task.
        start: initial position [3] of every object on the table, by body name.
        now: present positions, likewise.
        touched: names of the bodies that the gripper is in contact with.
        tolerance: scale of the allowed distance from the plate's centre, and of a push's allowed deviation; 1 is
            generous.

    If the wrong object is touched (for `touch`), pushed out of place or lifted, the episode ends in failure.
    """
    target = task.target.body
    moved = {name: now[name] - start[name] for name in start}
    others = [name for name in start if name != target and (task.plate is None or name != task.plate.body)]
    if task.family == "touch":
        return Judgement(target in touched, any(name in touched for name in others))
    failure = any(np.linalg.norm(moved[name]) > 0.035 for name in others)
    if task.family == "push":
        assert task.direction is not None
        along = float(moved[target][:2] @ task.direction)
        aside = float(abs(moved[target][0] * task.direction[1] - moved[target][1] * task.direction[0]))
        flat = abs(moved[target][2]) < 0.015
        success = along > 0.05 and aside < 0.04 * tolerance and flat
        return Judgement(success, failure or along < -0.05, _share(along / 0.05))
    if task.family == "lift":
        height = moved[target][2]
        return Judgement(bool(height > 0.05), failure, _share(height / 0.05))
    assert task.plate is not None
    offset = now[target] - now[task.plate.body]
    rest = (task.target.height + task.plate.height) / 2
    inside = np.linalg.norm(offset[:2]) < 0.05 * tolerance and abs(offset[2] - rest) < 0.01
    way = np.linalg.norm((start[target] - start[task.plate.body])[:2])
    return Judgement(
        bool(inside) and target not in touched, failure, _share(float(1 - np.linalg.norm(offset[:2]) / way))
    )


def _share(value: float) -> float:
    return float(np.clip(value, 0.0, 1.0))
