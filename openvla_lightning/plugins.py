"""Which packages a config or a checkpoint may name, and objects as plain data: a class and its arguments."""

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

GROUP = "openvla_lightning"
"""Entry point group in which an installed package declares that configs and checkpoints may name its classes."""
USUAL_HEAD = "openvla_lightning.action_head.TokenHead"
"""The action head of a checkpoint that names none."""


@cache
def roots() -> tuple[str, ...]:
    """Top-level packages whose classes may be named: this one, and installed ones that declare themselves."""
    declared = {entry.value.partition(":")[0].partition(".")[0] for entry in entry_points(group=GROUP)}
    return ("openvla_lightning", *sorted(declared - {"openvla_lightning"}))


def describe(thing: Any, default: str) -> dict[str, Any]:
    """Plain data that `rebuild` makes the same object of: `class` beside the constructor arguments in its `config`.

    Args:
        thing: has a `config`.
        default: dotted path of the class that is meant where none is named; its neighbours are named without a path.
    """
    kind = type(thing)
    package = import_module(default.rpartition(".")[0])
    near = getattr(package, kind.__name__, None) is kind
    return {"class": kind.__name__ if near else f"{kind.__module__}.{kind.__qualname__}", **thing.config}


def rebuild(config: Mapping[str, Any], default: str) -> Any:
    """Make an object of plain data: `{"class": "my_lab.heads.Mine", ...}`, whose other keys are arguments.

    Args:
        config: from a file. A class without dots is a neighbour of `default`; without `class`, as in early checkpoints,
            the word under `name` is one, or `default` itself is meant.
        default: dotted path of a class.

    Raises:
        ValueError: when the class is not to be had or refuses the arguments, saying what to do.
    """
    arguments = dict(config)
    home, _, usual = default.rpartition(".")
    named = arguments.pop("class", None)
    if named is None and "name" not in inspect.signature(getattr(import_module(home), usual)).parameters:
        named = arguments.pop("name", None)
    path = default if named is None else str(named) if "." in str(named) else f"{home}.{named}"
    kind = _found(path)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{path} does not take these arguments: {error}") from error


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    top = path.partition(".")[0]
    if top not in roots():
        raise ValueError(
            f"{path}: the package {top} is not known here. Install it (pip install ...): it declares itself with an "
            f'entry point, [project.entry-points."{GROUP}"]; known: {", ".join(roots())}'
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    if not inspect.isclass(found):
        raise ValueError(f"{path} is no class")
    return found
