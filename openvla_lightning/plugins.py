"""The packages that a config or a checkpoint may name, and objects as plain data: a class and its arguments.

A lab's own package is known if it is installed and declares itself,

    [project.entry-points."openvla_lightning"]
    my_lab = "my_lab"

or if `plugins=[my_lab]` or the variable OPENVLA_LIGHTNING_PLUGINS names it: a package, or the path of its folder.
Then configs may name its classes, a dataset's `transform` may name its functions, and Hydra searches its `conf/`, too.
"""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROUP = "openvla_lightning"
"""Entry point group in which an installed package declares itself."""
VARIABLE = "OPENVLA_LIGHTNING_PLUGINS"
"""Environment variable with further packages or folders, separated by commas; child processes inherit it."""
USUAL_HEAD = "openvla_lightning.action_head.TokenHead"
"""The action head of a checkpoint that names none."""
_OWN = ("openvla_lightning", "lightning")
MOVED = {
    "openvla_lightning.callbacks.checkpoint": "openvla_lightning.callbacks",
    "openvla_lightning.data.conversations": "openvla_lightning.data",
    "openvla_lightning.processor.images": "openvla_lightning.processor.image_transform",
}
"""Renamed modules -> where to import their contents from now; the error for an old name in a config says so."""


def roots() -> tuple[str, ...]:
    """Top-level packages that may be named: this one, Lightning, and those that were declared."""
    return (*_OWN, *packages())


def packages() -> tuple[str, ...]:
    """The plug-ins: packages that are installed and declare themselves, then those that the environment names."""
    named = [_importable(name) for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    return tuple(dict.fromkeys(name for name in (*_declared(), *named) if name not in _OWN))


@cache
def _declared() -> tuple[str, ...]:
    return tuple(sorted({entry.value.partition(":")[0].partition(".")[0] for entry in entry_points(group=GROUP)}))


def _importable(name: str) -> str:
    """The package that `name` means; the folder that holds it becomes importable when `name` is a path."""
    name = name.strip()
    if os.sep not in name:
        return name.partition(".")[0]
    folder = Path(name).expanduser().resolve()
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    return folder.name


def add(names: Sequence[str]) -> None:
    """Let packages or folders be named from now on, also in processes that this one starts.

    Raises:
        ValueError: there is no such package, or Python finds another one of its name; also for those that the
            environment names.
    """
    known = [name for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for place, named in ((VARIABLE, known), ("plugins", names)):
        for name in named:
            if problem := _problem(name.strip()):
                raise ValueError(f"{place}: {problem}")
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*known, *names]))


def _problem(name: str) -> str | None:
    """Why a named plug-in is not what Python imports; None if it is."""
    package = _importable(name)
    if (spec := _spec(package)) is None:
        return f"there is no package {name!r}; install it, or give the path of its folder: plugins=[/path/to/it]"
    found = [Path(place).resolve() for place in spec.submodule_search_locations or (spec.origin or "",)]
    folder = Path(name).expanduser().resolve() if os.sep in name else found[0]
    if folder not in found:
        return f"{name} is not what Python imports as {package}, that is {found[0]}: rename or remove one of them"
    project = any((folder / file).is_file() for file in ("pyproject.toml", "setup.py"))
    if project and (inside := sorted(path.parent for path in folder.glob("*/__init__.py"))):
        return f"{name} is the folder of a project; name its package: plugins=[{inside[0]}]"
    return None


def _spec(package: str) -> ModuleSpec | None:
    return find_spec(package) if package.isidentifier() else None


def config_folders() -> Iterator[tuple[str, Path]]:
    """Each plug-in that has configs, and their folder: `conf/` inside the package."""
    for package in packages():
        spec = _spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (folder := Path(place) / "conf").is_dir():
                yield package, folder


def check(path: str) -> None:
    """Make sure that a config may name this dotted path. A config may come from a stranger and must not call anything.

    Raises:
        ValueError: its package is not declared, or it was moved; the message says what to do.
    """
    module, _, name = path.rpartition(".")
    if module in MOVED:
        raise ValueError(f"{path} is {MOVED[module]}.{name} now")
    top = path.partition(".")[0]
    if top not in roots():
        raise ValueError(
            f"{path}: the package {top} is not known here; known: {', '.join(roots())}. A lab's own package declares "
            f'itself with an entry point, [project.entry-points."{GROUP}"], once it is installed; or name it: '
            f"plugins=[{top}], or {VARIABLE}={top}, or the path of its folder in place of {top}"
        )


def check_home(path: str, thing: Any) -> None:
    """Make sure that a path into this package or Lightning does not lead to a `thing` that they import from elsewhere.

    Raises:
        ValueError: it does, as `openvla_lightning.demo.subprocess.run` would.
    """
    home = str(getattr(thing, "__module__", None) or path)
    if path.partition(".")[0] in _OWN and home.partition(".")[0] not in roots():
        raise ValueError(f"{path} leads to {home}; name what {' or '.join(_OWN)} define themselves")


def find(path: str) -> Any:
    """The class or function at a dotted path, after `check` and `check_home`.

    Raises:
        ValueError: as these, or when it cannot be imported.
    """
    check(path)
    module, _, name = path.rpartition(".")
    try:
        thing = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    check_home(path, thing)
    return thing


def describe(thing: Any, default: str) -> dict[str, Any]:
    """Plain data from which `rebuild` makes the same object: its `class` and constructor arguments (`config`).

    Args:
        thing: has a `config`.
        default: dotted path of the default class; classes in the same module are named without a path.
    """
    class_ = type(thing)
    package = import_module(default.rpartition(".")[0])
    near = getattr(package, class_.__name__, None) is class_
    return {"class": class_.__name__ if near else f"{class_.__module__}.{class_.__qualname__}", **thing.config}


def rebuild(config: Mapping[str, Any], default: str) -> Any:
    """Make an object from plain data: `{"class": "my_lab.heads.Mine", ...}`, whose other keys are arguments.

    Args:
        config: from a file. A class without dots is in the module of `default`. Early checkpoints have no `class`:
            there, `name` is a class of that module, or `default` itself is meant.
        default: dotted path of a class.

    Raises:
        ValueError: the class cannot be found or refuses the arguments; the message says what to do.
    """
    arguments = dict(config)
    home, _, usual = default.rpartition(".")
    named = arguments.pop("class", None)
    if named is None and "name" not in inspect.signature(getattr(import_module(home), usual)).parameters:
        named = arguments.pop("name", None)
    path = default if named is None else str(named) if "." in str(named) else f"{home}.{named}"
    class_ = find(path)
    if not inspect.isclass(class_):
        raise ValueError(f"{path} is no class")
    try:
        return class_(**arguments)
    except TypeError as error:
        raise ValueError(f"{path} does not take these arguments: {error}") from error


def check_kept(thing: Any, default: str, given: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint can bring back `thing`, before a training ends with one that cannot be loaded.

    Args:
        thing: has a `config`.
        default: as in `describe`.
        given: the arguments that it was made with.

    Raises:
        ValueError: its `config` is not plain data, lacks an argument that was given, or is refused by its constructor.
    """
    kept, usual = describe(thing, default), inspect.signature(type(thing)).parameters
    whose = f"{type(thing).__module__}.{type(thing).__qualname__}.config"
    if strange := [f"{name}={value} ({type(value).__name__})" for name, value in kept.items() if not _is_plain(value)]:
        raise ValueError(
            f"{whose} holds {', '.join(strange)[:200]}, and checkpoints keep only numbers, texts, true, false, null, "
            "and lists and dictionaries of these: give the constructor's arguments as such"
        )
    lost = [n for n, value in given.items() if n in usual and n not in kept and value != usual[n].default]
    if lost:
        raise ValueError(
            f"{whose} lacks {', '.join(lost)}, which a loaded checkpoint would not have: return it as well"
        )
    rebuild(kept, default)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(type(key) is str and _is_plain(child) for key, child in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
