"""Converts the words after a command's name so that Hydra's grammar reads them as intended."""

import re
import shlex
from collections.abc import Sequence

TEXTS = ("run_name", "label", "ckpt_path", "unnorm_key", "model.init_from", "paths.data_dir", "paths.log_dir")
"""Settings whose values are always text, also if they look like numbers: `run_name=007` is not 7."""


class OverrideError(ValueError):
    """A word on the command line that cannot be read; the message says how to write it."""


def quoted(value: str) -> str:
    """A value in quotes for Hydra's grammar, so that `=`, `,`, brackets, spaces and all letters are literal."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def readable(words: Sequence[str]) -> list[str]:
    """The same words, with options first, and with quotes around paths that Hydra's grammar cannot read.

    Args:
        words: the command line without the command.

    Raises:
        OverrideError: a word is neither an option of Hydra nor `key=value`, or its value cannot be read.
    """
    from hydra._internal.utils import get_args_parser  # Hydra has no public list of its options

    known, unknown = get_args_parser().parse_known_intermixed_args(list(words))
    if unknown:
        raise OverrideError(
            f"there is no option {unknown[0]}: settings are written without dashes, as key=value; "
            "--help lists them, --hydra-help lists Hydra's own options"
        )
    overrides, options = list(known.overrides), list(words)
    for text in overrides:
        options.remove(text)
    # Hydra needs its options together
    return [*options, *(_prepared(text, overrides[place + 1 :]) for place, text in enumerate(overrides))]


def _prepared(text: str, following: Sequence[str]) -> str:
    key, equals, value = text.partition("=")
    if _parses(text):
        return f"{key}={quoted(value)}" if key.lstrip("+") in TEXTS and _no_text(text) else text
    if not equals:
        then = following[0] if following and "=" not in following[0] else "..."
        raise OverrideError(f"{text!r} sets nothing: write {key}={then}, without spaces around the equals sign")
    if key.lstrip("+") not in TEXTS and re.fullmatch(r"\[.*\]|\{.*\}", value.strip(), re.S):
        if _parses(items := f"{key}={_items_quoted(value)}"):
            return items
        raise OverrideError(
            f"{text!r} cannot be read: texts in a list or dictionary that hold more than letters and digits are "
            "quoted, as in [a,'b c'], and names in a dictionary are ASCII; a YAML file takes anything "
            "(docs/configuration.md)"
        )
    in_quotes = f"{key}={quoted(value)}"
    if _parses(in_quotes) and ("/" in value or value.startswith("~")):
        return in_quotes
    if _parses(in_quotes):
        raise OverrideError(
            f"{text!r} cannot be read: = , : [ ] {{ }} ( ) quotes, spaces and letters outside ASCII mean something to "
            f"Hydra. If the value is meant as it stands, quote it: {shlex.quote(in_quotes)}"
        )
    raise OverrideError(f"{text!r} cannot be read: the name of a setting is letters, digits, . _ / and @")


def _items_quoted(value: str) -> str:
    """A list or dictionary with quotes around texts that Hydra's grammar cannot read."""

    def readable_item(item: str) -> str:
        bare = item.strip()
        plain = not bare or bare[0] in "'\"" or _parses(f"x={bare}")
        return item if plain else item.replace(bare, quoted(bare))

    return "".join(part if part in "[]{},:" else readable_item(part) for part in re.split(r"([\[\]{},:])", value))


def _no_text(text: str) -> bool:
    """Whether Hydra reads the value of an override as a number, a boolean, a list or a dictionary."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(text)
    return not override.is_sweep_override() and isinstance(override.value(), bool | int | float | list | dict)


def _parses(text: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return True
