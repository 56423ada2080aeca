"""What can be wrong with a dataset's files: the errors, the choice that a user has, and how both are said."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

BadTrajectories = Literal["error", "skip"]
"""What to do with trajectories that cannot be read: stop at the first, or leave them out and list them."""

WAY_OUT = "Get this file again, or leave such trajectories out with data.source.bad_trajectories=skip"


class BadShardError(ValueError):
    """A file of a dataset cannot be read as it should be."""


def first_of(skipped: Sequence[Mapping[str, Any]], few: int = 1) -> str:
    """Where the first of the trajectories that could not be read are, and why; empty when there are none."""
    return "".join(f"; of {one['file']}, trajectory {one['trajectory']}: {one['reason']}" for one in skipped[:few])


def absent(option: str, path: str, there: list[str], where: str) -> str:
    """Say that `option` names a `path` that is not `there`, and what was perhaps meant."""
    close = get_close_matches(path, there, 1, 0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{option}: no {path!r}{hint} {where.capitalize()} holds {', '.join(sorted(there))}"
