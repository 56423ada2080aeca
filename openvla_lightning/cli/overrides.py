"""What is typed after a command's name, brought into a form that Hydra's grammar reads as it was meant."""

import re
import shlex
from collections.abc import Sequence

TEXTS = ("run_name", "label", "ckpt_path", "unnorm_key", "model.init_from", "paths.data_dir", "paths.log_dir")
"""Settings whose values are texts, also those that look like numbers: `run_name=007` is no 7."""


class OverrideError(ValueError):
    """Something on the command line that cannot be read; the message says how to write it."""


def quoted(value: str) -> str:
    """A value in quotes, for Hydra's grammar: `=`, `,`, brackets, spaces and letters of any script mean themselves."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def readable(words: Sequence[str]) -> list[str]:
    """The same words, options first, and paths in quotes where Hydra's grammar would stumble over them.

    Args:
        words: the command line without the command.

    Raises:
        OverrideError: a word is neither an option of Hydra's nor `key=value`, or its value cannot be read.
    """
    from hydra._internal.utils import get_args_parser  # Hydra offers no other list of its options

    known, unknown = get_args_parser().parse_known_intermixed_args(list(words))
    if unknown:
        raise OverrideError(
            f"there is no option {unknown[0]}: settings are written without dashes, as key=value; "
            "--help lists them, --hydra-help lists Hydra's own options"
        )
    overrides, options = list(known.overrides), list(words)
    for text in overrides:
        options.remove(text)
    # Hydra wants its options in one piece
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
    """A list or dictionary in which texts that Hydra's grammar does not read are quoted."""

    def readable_item(item: str) -> str:
        bare = item.strip()
        plain = not bare or bare[0] in "'\"" or _parses(f"x={bare}")
        return item if plain else item.replace(bare, quoted(bare))

    return "".join(part if part in "[]{},:" else readable_item(part) for part in re.split(r"([\[\]{},:])", value))


def _no_text(text: str) -> bool:
    """Whether Hydra reads the value of an override as a number, a truth, a list or a dictionary."""
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
