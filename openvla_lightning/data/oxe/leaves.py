"""Access by path to the leaves of a trajectory, which is a tree of dictionaries."""

from collections.abc import Mapping
from typing import Any


def leaf_at(trajectory: Mapping[str, Any], path: str) -> Any:
    """Return the leaf at a path such as `observation/state`; a key itself may contain a slash.

    Raises:
        KeyError: there is no such leaf; the message lists the existing ones.
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
    """A copy with another leaf at `path`, which must exist."""
    if path in trajectory:
        return {**trajectory, path: leaf}
    part, _, rest = path.partition("/")
    return {**trajectory, part: put_at(trajectory[part], rest, leaf)}
