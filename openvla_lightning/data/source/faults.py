"""Errors of a dataset's files, the user's choice of their treatment, and helpers for the messages."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from openvla_lightning.data.oxe.spec import DescriptionError, TransformError

BadTrajectories = Literal["error", "skip"]
"""Treatment of unreadable trajectories: stop at the first one, or leave them out and list them."""

WAY_OUT = "Get this file again, or leave such trajectories out with data.source.bad_trajectories=skip"


MISNAMED = "Say what the files hold in the dataset's description (data.datasets.{name}, docs/data.md)"
OWN = "Mend that function, or leave such trajectories out with data.source.bad_trajectories=skip"


def way_out(error: Exception, name: str) -> str:
    """What to do about what is wrong with a trajectory of the dataset `name`: a typo is no damage."""
    if isinstance(error, TransformError):
        return OWN
    return MISNAMED.format(name=name) if isinstance(error, KeyError | DescriptionError) else WAY_OUT


class BadShardError(ValueError):
    """A file of a dataset is damaged or has an unexpected form."""


def first_of(skipped: Sequence[Mapping[str, Any]], few: int = 1) -> str:
    """Places and reasons of the first unreadable trajectories; empty if there are none."""
    return "".join(f"; of {one['file']}, trajectory {one['trajectory']}: {one['reason']}" for one in skipped[:few])


def absent(option: str, path: str, there: list[str], where: str) -> str:
    """Message that `option` names a `path` that is not `there`, with a suggestion."""
    close = get_close_matches(path, there, 1, 0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{option}: no {path!r}{hint} {where.capitalize()} holds {', '.join(sorted(there))}"
