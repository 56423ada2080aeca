"""Configuration: the resolvers of conf/, and the check of a composed config before anything heavy is built."""

import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openvla_lightning import plugins
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.processor.prompt import prompt_of

log = logging.getLogger(__name__)

CONF = str(next(p for p in (Path(__file__).parents[1] / "conf", Path(__file__).parent / "conf") if p.is_dir()))
"""The folder of configs: beside the package in a checkout, inside it once installed."""


class PluginConfigs(SearchPathPlugin):
    """Makes Hydra search the `conf/` of plug-ins, after our own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the config folder of each plug-in."""
        for package, folder in plugins.config_folders():
            search_path.append(provider=package, path=f"file://{folder}")


Plugins.instance().register(PluginConfigs)


class ConfigError(ValueError):
    """Everything wrong with a config, one line each."""


@contextmanager
def for_people(*kinds: type[Exception]) -> Iterator[None]:
    """Decorator for scripts: errors of these kinds end the process with their message, without a traceback.

    The same holds for a ValueError or a missing file from a constructor named in the config, and for a missing package.
    HYDRA_FULL_ERROR=1 adds the traceback, as for Hydra's own errors.
    """
    caught: tuple[type[Exception], ...] = (*kinds, InstantiationException)
    try:
        yield
    except caught as error:
        shown = error.__cause__ if isinstance(error, InstantiationException) else error
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not isinstance(
            shown, (*kinds, ValueError, FileNotFoundError, ModuleNotFoundError)
        ):
            raise
        raise SystemExit(f"error: {shown}") from None


@contextmanager
def blaming_config() -> Iterator[None]:
    """For code that builds what a config names: a ValueError inside this context becomes a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def expanded(path: str) -> str:
    """A path with `~` replaced by the home folder, for paths that no shell expands, such as those in YAML."""
    return os.path.expanduser(path)


def expand_home(node: DictConfig | ListConfig) -> None:
    """Expand every value of a config that begins with `~`, in place; interpolations are left as they are."""
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            expand_home(value)
        elif isinstance(value, str) and (value == "~" or value.startswith("~/")):
            node[key] = expanded(value)


def find_checkpoint(cfg: DictConfig, otherwise: str) -> None:
    """Replace `ckpt_path` by a file: for `last`, a run or a folder of runs, this is the newest checkpoint.

    It is the file and not its folder, because results are kept by its hash and may be written into that folder.

    Args:
        cfg: config of a command that acts.
        otherwise: advice for the error when there is no checkpoint yet.

    Raises:
        ConfigError: `ckpt_path` is `last`, and there is no checkpoint.
    """
    if cfg.ckpt_path == "last":
        newest = newest_checkpoint(cfg.paths.log_dir)
        if newest is None:
            raise ConfigError(f"no checkpoint below {cfg.paths.log_dir}/ yet; {otherwise}")
        log.info(f"The newest checkpoint is {newest}")
        cfg.ckpt_path = str(newest)
    elif cfg.ckpt_path and Path(cfg.ckpt_path).is_dir():
        cfg.ckpt_path = str(newest_checkpoint(cfg.ckpt_path) or cfg.ckpt_path)


def run_dir(log_dir: str, run_name: str, ckpt_path: str | None, run_id: str | None) -> str:
    """The folder of a run: `<log_dir>/<run_name>/<id or time>`, or with `ckpt_path=last` the one that is resumed."""
    runs = Path(expanded(log_dir)) / run_name
    if ckpt_path == "last" and (newest := newest_checkpoint(runs)) is not None:
        return str(newest.parent.parent)
    return str(runs / (run_id or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")))


def sweep_dir(log_dir: str, run_name: str, ckpt_path: str | None, run_id: str | None) -> str:
    """The folder of a sweep: as for a run, or with `ckpt_path=last` the newest sweep's, which is then resumed."""
    runs = Path(expanded(log_dir)) / run_name
    if ckpt_path == "last" and (sweeps := [path.parent for path in runs.glob("*/multirun.yaml")]):
        return str(max(sweeps, key=lambda folder: (folder / "multirun.yaml").stat().st_mtime_ns))
    return run_dir(log_dir, run_name, None, run_id)


OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=True)
OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)  # a sweep has one folder
OmegaConf.register_new_resolver("home", expanded, replace=True)
OmegaConf.register_new_resolver("modulo", lambda number, by: number % by, replace=True)
OmegaConf.register_new_resolver("prompt_of", prompt_of, replace=True)  # so that a printed config shows the prompt


def validate(cfg: DictConfig) -> dict[str, Any]:
    """Return `cfg` as plain resolved data, or raise ConfigError naming every problem.

    A constructor's signature is its schema: each `_target_` node must bind to it.
    Arguments that `run` adds at build time (processor, callbacks) may be absent here. `~` becomes the home folder.
    """
    expand_home(cfg)
    if missing := list(missing_keys(cfg)):
        raise ConfigError("\n  ".join(["set these on the command line:", *missing]))
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from None
    problems = [p for path, node in targets(tree) for p in unbound(path, node)]
    if problems := [*problems, *foreign_functions(tree)]:
        raise ConfigError("\n  ".join(["these do not fit what they configure:", *problems]))
    return tree  # type: ignore[return-value]


def foreign_functions(tree: Any) -> Iterator[str]:
    """Problems of datasets whose function is in a package that a config may not name (the rule of `_target_`)."""
    for path, node in nodes(tree):
        datasets = node.get("datasets")
        for name, options in datasets.items() if isinstance(datasets, dict) else ():
            function = options.get("transform") if isinstance(options, dict) else None
            try:
                plugins.check(function or "openvla_lightning")
            except ValueError as error:
                yield f"{path}.datasets.{name}.transform: {error}"


def missing_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of `???` values, without following interpolations."""
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key):
            yield f"{prefix}{key}"
        elif not OmegaConf.is_interpolation(cfg, key) and isinstance(cfg[key], DictConfig):
            yield from missing_keys(cfg[key], f"{prefix}{key}.")


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary with a `_target_`, outermost first, with its dotted path."""
    return ((place, found) for place, found in nodes(node, path) if "_target_" in found)


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary in a tree, outermost first, with its dotted path."""
    if isinstance(node, dict):
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from nodes(child, f"{path}.{key}".lstrip("."))


def unbound(path: str, node: dict[str, Any]) -> Iterator[str]:
    """Why `node` cannot be passed to its `_target_`, if it cannot."""
    name = node["_target_"]
    try:
        plugins.check(name)
    except ValueError as error:
        yield f"{path}: {error}"
        return
    kwargs = {k: v for k, v in node.items() if not k.startswith("_")}
    known: Sequence[str] = ()
    try:
        plugins.check_home(name, target := get_object(name))
        signature = inspect.signature(target)
        known = list(signature.parameters)
        signature.bind_partial(**kwargs)
    except (ImportError, TypeError, ValueError) as error:
        meant = [close[0] for key in kwargs if key not in known and (close := get_close_matches(key, known, 1))]
        yield f"{path}: {name}: {error}" + (f"; did you mean {meant[0]!r}?" if meant else "")
