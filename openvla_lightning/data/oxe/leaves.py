"""Leaves of a trajectory, which is a tree of dictionaries, by their paths."""

from collections.abc import Mapping
from typing import Any


def leaf_at(trajectory: Mapping[str, Any], path: str) -> Any:
    """Return the leaf at a path like `observation/state`; some datasets have a slash in a key itself.

    Raises:
        KeyError: naming what is there instead.
    """
    if path in trajectory:
        return trajectory[path]
    part, _, rest = path.partition("/")
    if rest and isinstance(trajectory.get(part), Mapping):
        try:
            return leaf_at(trajectory[part], rest)
        except KeyError as error:
            raise KeyError(error.args[0].replace(repr(rest), repr(path), 1).replace("the trajectory", part)) from None
    there = ", ".join(trajectory) if part not in trajectory else f"an array under {part!r}"
    raise KeyError(f"no {path!r}: the trajectory holds {there}")


def put_at(trajectory: Mapping[str, Any], path: str, leaf: Any) -> dict[str, Any]:
    """A copy with another leaf at `path`, which names one that is there."""
    if path in trajectory:
        return {**trajectory, path: leaf}
    part, _, rest = path.partition("/")
    return {**trajectory, part: put_at(trajectory[part], rest, leaf)}
