"""Common parts of all commands that Hydra runs: the help page, suggestions after a wrong name, quick imports."""

import atexit
import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from openvla_lightning import plugins
from openvla_lightning.cli import help
from openvla_lightning.cli.overrides import readable
from openvla_lightning.cli.written import directories, unreadable
from openvla_lightning.config import CONF


def command(config_name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Decorator for a script, above `hydra.main`, which adds a help page, and suggestions after a wrong name."""

    def decorate(script: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(script)
        def run() -> Any:
            if {"--help", "-h"} & set(sys.argv):  # Hydra's own help takes twice as long
                return print(
                    help.help_page(CONF, config_name, installed=Path(sys.argv[0]).parent.name == "cli"), end=""
                )
            try:
                sys.argv[1:] = readable(sys.argv[1:])
                plugins.add([name for word in sys.argv[1:] if word.startswith("plugins=") for name in named(word)])
            except ValueError as error:
                raise SystemExit(f"error: {error}") from None
            overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
            problem = help.renamed(overrides) or help.misspelt_addition(help.groups(CONF, config_name), overrides)
            own = [folder for _, folder in plugins.config_folders()]
            problem = problem or unreadable(sys.argv[1:], [Path(CONF), *own])
            if problem:
                raise SystemExit(f"error: {problem}")
            try:
                return script()
            except SystemExit as end:
                if end.code == 1:  # Hydra's exit code after any error
                    for hint in hints(config_name, overrides, [*directories(sys.argv[1:]), *own]):
                        print(hint, file=sys.stderr)
                raise

        return run

    return decorate


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """What is imported inside is never looked through for garbage: that took a sixth of a command's start-up."""
    if gc.get_freeze_count():  # a later job of a sweep imports nothing, and what the last one left is garbage
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.disable)  # the process ends, and with it all that could be collected
        atexit.register(gc.unfreeze)  # else native modules report what is still there


def named(override: str) -> list[str]:
    """The plug-ins in `plugins=[my_lab,/path/to/another]`, which must be known before a config is composed."""
    return [name.strip(" '\"") for name in override.partition("=")[2].strip("[]").split(",") if name.strip(" '\"")]


def hints(config_name: str, overrides: Sequence[str], own: Sequence[Path] = ()) -> list[str]:
    """Suggestions of group, option or key for each override with a wrong name; empty if all names are right.

    Args:
        config_name: name of the script's config.
        overrides: from the command line.
        own: users' folders of configs.
    """
    groups = help.groups(CONF, config_name)
    for key in {help.key_and_value(text)[0] for text in overrides} - groups.keys():
        if "/" in key and (folder := Path(CONF, key)).is_dir():  # evaluate.py has data/mix with env=offline only
            groups[key] = help.options_in(folder)
    options = help.wrong_options(groups, overrides, own)
    chosen = [text for text in overrides if help.key_and_value(text)[0] in groups and "," not in text]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        try:
            cfg = compose(config_name, [text for text in chosen if text not in options])
        except HydraException:
            cfg = compose(config_name)
    known = [*groups, *dotted(OmegaConf.to_container(cfg, resolve=False))]
    return [*options.values(), *help.wrong_keys(known, overrides, CONF)]


def dotted(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values in a tree of dictionaries, inner ones included."""
    for key, child in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{key}"
        yield from dotted(child, f"{prefix}{key}.")
