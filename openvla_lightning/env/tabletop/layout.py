"""Choice and places of the objects in an episode."""

from collections.abc import Callable, Sequence

import numpy as np

from openvla_lightning.env.tabletop.scene import TABLE_X, TABLE_Y, Thing

Strip = tuple[float, float]
"""Range of y in which an object may lie, m."""


def choose(random: np.random.Generator, things: Sequence[Thing], needed: Thing | None, count: int) -> list[Thing]:
    """Choose `count` of the things, including `needed`.

    They come in the order of `things`, so that the layout does not show which one the task is about.
    """
    others = [thing for thing in things if thing is not needed]
    picked = [] if needed is None else [needed]
    order = random.permutation(len(others))[: max(count - len(picked), 0)]
    picked += [others[i] for i in order]
    return [thing for thing in things if thing in picked]


def strip(objects: Sequence[Thing], thing: Thing) -> Strip:
    """An object's own strip of a tidy table, from left to right in the order of `objects`; anywhere for a plate."""
    if thing not in objects:
        return TABLE_Y
    width = (TABLE_Y[1] - TABLE_Y[0]) / len(objects)
    middle = TABLE_Y[0] + width * (objects.index(thing) + 0.5)
    return middle - 0.3 * width, middle + 0.3 * width


def spots(
    random: np.random.Generator, things: Sequence[Thing], where: Callable[[Thing], Strip] = lambda _: TABLE_Y
) -> list[np.ndarray]:
    """Return a free place (x, y) on the table for each thing, within the strip that `where` gives it.

    Raises:
        ValueError: if there is no room.
    """
    for _ in range(1000):
        placed: list[np.ndarray] = []
        for thing in things:
            left, right = where(thing)
            tries = random.uniform((TABLE_X[0], left), (TABLE_X[1], right), (20, 2))
            room = [spot for spot in tries if _free(spot, thing, placed, things)]
            if not room:
                break
            placed.append(room[0])
        else:
            return placed
    raise ValueError(f"no room on the table for {[thing.name for thing in things]}: ask for fewer objects per scene")


def _free(spot: np.ndarray, thing: Thing, taken: Sequence[np.ndarray], things: Sequence[Thing]) -> bool:
    """Whether there is room for the open fingers (52 mm from the middle) between this place and the taken ones."""
    return all(
        np.linalg.norm(spot - other) > thing.radius + neighbour.radius + 0.060
        for other, neighbour in zip(taken, things, strict=False)  # things not placed yet have no spot
    )
