"""Checks of a config that need only source files: within a second, before anything heavy is imported."""

import ast
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openvla_lightning.run.nowhere import not_there

UNKNOWN = object()

NUMBER = (int, float)
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda v: isinstance(v, NUMBER) and not isinstance(v, bool) and float(v).is_integer()),
    "float": ("a number", lambda v: isinstance(v, NUMBER) and not isinstance(v, bool)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a text", lambda v: isinstance(v, str | int | float)),
    "Path": ("a path", lambda v: isinstance(v, str)),
    "None": ("null", lambda v: v is None),
    **dict.fromkeys(("Sequence", "list", "tuple", "List", "Iterable"), ("a list", lambda v: isinstance(v, list))),
    **dict.fromkeys(("Mapping", "dict", "Dict"), ("a dictionary", lambda v: isinstance(v, dict))),
}
"""Supported annotations -> their name in messages, and a test of config values; others accept every value."""


def _from(low: float) -> Callable[[Any], bool]:
    return lambda v: not isinstance(v, NUMBER) or v >= low


def _whole(low: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low


LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": ("a whole number from 0 to 4294967295", lambda v: _whole(0)(v) and v < 2**32),
    "save_every": ("a whole number; 0 saves the last step only", _whole(0)),
    "batch_size_per_device": ("a whole number of at least 1", _whole(1)),
    "compile_blocks": KINDS["bool"],
    "estimate": KINDS["bool"],
    "episodes_per_task": ("a whole number of at least 1, or auto", lambda v: v == "auto" or _whole(1)(v)),
    "num_envs": ("a whole number of at least 1", _whole(1)),
    "num_workers": ("a whole number", _whole(0)),
    "save_videos": ("a whole number", _whole(0)),
    "checkpoint_activations": ("one of none, selective, full", lambda v: v in ("none", "selective", "full")),
    "data.num_workers": ("at least 0", _from(0)),
    "trainer.max_steps": ("at least 1, or -1 for a run without an end", lambda v: v == -1 or _from(1)(v)),
    "trainer.val_check_interval": ("more than 0", lambda v: v != 0 and _from(0)(v)),
    "trainer.limit_val_batches": ("at least 0", _from(0)),
    "trainer.log_every_n_steps": ("at least 1", _from(1)),
    "trainer.accumulate_grad_batches": ("at least 1", _from(1)),
    "trainer.gradient_clip_val": ("at least 0; null clips nothing", _from(0)),
    "trainer.devices": ("at least 1, or auto", lambda v: v == -1 or _from(1)(v)),
    "trainer.precision": (
        "one of 32-true, bf16-mixed, 16-mixed, as weights in 16 bits would lose small steps",
        lambda v: str(v) in ("32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed"),
    ),
}
"""Settings that no annotation limits, or not enough -> the values that fit, and a test of one; null always fits."""


class EarlyChecks(Callback):
    """Ends a run with config values of the wrong type or with missing files, before its folder is created."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a single run."""
        _check(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check before each run of a sweep."""
        _check(config)


def _check(config: DictConfig) -> None:
    plain = plain_values(config)
    if problems := wrong_types(plain):
        raise SystemExit("\n  ".join(["error: these values do not fit:", *problems]))
    if absent := not_there(plain):
        raise SystemExit("\n  ".join(["error: this run cannot start, as these are not there:", *absent]))


def plain_values(config: DictConfig) -> dict[str, Any]:
    """The config as plain data, without Hydra's part; UNKNOWN for a value that cannot be resolved yet."""
    return {str(key): _plain(config, str(key)) for key in config if key != "hydra"}


def wrong_types(plain: Mapping[str, Any]) -> list[str]:
    """One line for each argument of a `_target_` whose value does not fit its annotation, or a run's `LIMITS`."""
    problems = [problem for path, node in _targets(plain) for problem in _misfits(path, node)]
    named = {problem.partition("=")[0] for problem in problems}
    return problems + [problem for name in LIMITS if name not in named for problem in _beyond(plain, name)]


def _beyond(plain: Mapping[str, Any], name: str) -> Iterator[str]:
    group, _, key = name.rpartition(".")
    settings = plain.get(group) if group else plain
    value = settings.get(key, UNKNOWN) if isinstance(settings, Mapping) else UNKNOWN
    expected, fits = LIMITS[name]
    if value is not UNKNOWN and value is not None and not fits(value):
        yield f"{name}={value!r}: expected {expected}"


def _plain(node: Any, key: Any) -> Any:
    """A value as plain data; UNKNOWN if it cannot be resolved yet."""
    try:
        if OmegaConf.is_missing(node, key):
            return UNKNOWN
        value = node[key]
    except OmegaConfBaseException:
        return UNKNOWN
    except Exception:  # a resolver that needs the run's folder
        return UNKNOWN
    if OmegaConf.is_dict(value):
        return {inner: _plain(value, inner) for inner in value}
    if OmegaConf.is_list(value):
        return [_plain(value, place) for place in range(len(value))]
    return value


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield path, node
        for key, child in node.items():
            yield from _targets(child, f"{path}.{key}".lstrip("."))


def _misfits(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    for name, annotation in _annotations(node["_target_"]).items():
        value = node.get(name, UNKNOWN)
        if value is UNKNOWN or (isinstance(value, dict) and "_target_" in value):
            continue
        if value is None and node.get("_partial_"):  # the caller passes it, as a policy its image size
            continue
        if expected := _misfit(value, annotation):
            yield f"{path}.{name}={value!r}: expected {expected}".lstrip(".")


def _misfit(value: Any, annotation: ast.expr) -> str | None:
    """The expected type; None if the value fits, or this cannot be decided."""
    choices = _alternatives(annotation)
    wanted = []
    for choice in choices:
        known = _kind(choice)
        if known is None or known[1](value):
            return None
        wanted.append(known[0])
    return " or ".join(wanted)


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _alternatives(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) in ("Optional", "Union"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        none = [ast.Constant(None)] if _name(annotation.value) == "Optional" else []
        return [*none, *(choice for part in inner for choice in _alternatives(part))]
    return [annotation]


def _kind(annotation: ast.expr) -> tuple[str, Callable[[Any], bool]] | None:
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return KINDS["None"]
    if isinstance(annotation, ast.Subscript):
        if _name(annotation.value) == "Literal":
            parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            values = [part.value for part in parts if isinstance(part, ast.Constant)]
            return "one of " + ", ".join(map(str, values)), lambda value: value in values
        return KINDS.get(_name(annotation.value))
    return KINDS.get(_name(annotation))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@cache
def _annotations(target: str) -> dict[str, ast.expr]:
    """Argument -> annotation of a `_target_`, from its source file; empty if that is not found."""
    module, _, name = target.rpartition(".")
    definition = _definition(module, name)
    if isinstance(definition, ast.ClassDef):
        definition = next((f for f in definition.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    if not isinstance(definition, ast.FunctionDef):
        return {}
    arguments = [*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs]
    return {argument.arg: argument.annotation for argument in arguments if argument.annotation is not None}


def _definition(module: str, name: str, depth: int = 0) -> ast.stmt | None:
    """The class or function called `name` in a module, following imports."""
    tree = _tree(module)
    if tree is None or depth > 5:
        owner, _, outer = module.rpartition(".")
        definition = _definition(owner, outer, depth + 1) if owner and depth <= 5 else None
        return next((f for f in getattr(definition, "body", ()) if getattr(f, "name", None) == name), None)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name, depth + 1)
    return None


@cache
def _tree(module: str) -> ast.Module | None:
    """A module's syntax tree, found from the top package's location, so that nothing is imported."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for root in (spec.submodule_search_locations or ()) if spec else ():
        place = Path(root, *inner)
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return None
