"""Checks users' own YAML files before Hydra reads them, so that a mistake gives one sentence instead of a traceback."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from openvla_lightning.cli.help import GROUPS, key_and_value

DIRECTORIES = ("--config-dir", "-cd")
HINTS = {
    r"found character '\\t'": "indent with spaces, YAML takes no tabs",
    r"mapping values are not allowed": "a value with a colon in it needs quotes, as in label: 'a: b'; so does a key",
    r"cannot start any token": "a value that begins so needs quotes",
    r"unknown escape|expected escape": "in double quotes a backslash means something: use single quotes",
    r"unexpected end of stream|while scanning a quoted": "a quote is opened and not closed",
    r"could not find expected ':'": "a line of a dictionary is `key: value`, with a space behind the colon",
    r"expected <block end>|expected the node content|expected ',' or": "indentation or brackets do not fit together",
    r"undefined alias|alphabetic or numeric": "a value that begins with * or & needs quotes",
}
"""Message of YAML's parser -> advice."""


def directories(words: Sequence[str]) -> list[Path]:
    """The folders that `--config-dir` names in a command line."""
    apart = [Path(words[i + 1]) for i, word in enumerate(words[:-1]) if word in DIRECTORIES]
    return apart + [Path(word.partition("=")[2]) for word in words if word.startswith("--config-dir=")]


def unreadable(words: Sequence[str], places: Sequence[Path]) -> str | None:
    """The problem of a user's file that these words choose; None if none is found.

    Args:
        words: the command line without the command.
        places: users' folders of configs, besides those of `--config-dir`.
    """
    folders, visited = [*directories(words), *places], set[Path]()
    pending = [Path("local/default")]
    for word in words:
        key, _, value = key_and_value(word)
        if "=" in word and not word.startswith("-"):
            pending += [Path(key) / option.strip(" '\"") for option in value.strip("[]").split(",")]
    while pending:
        option = pending.pop()
        for folder in folders:
            path = folder / f"{option}.yaml"
            if path in visited or not path.is_file():
                continue
            visited.add(path)
            if problem := wrong(path, option):
                return problem
            pending += _chosen(option, yaml.load(path.read_text(encoding="utf-8-sig"), _Loader))
    return None


def wrong(path: Path, option: Path) -> str | None:
    """The problem of one file, chosen as `option`, as a sentence with path and line; None if there is none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        return f"{path}, line {line}: it is not UTF-8, as YAML is; save it in that encoding"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(str(part) for part in (error.context, error.problem) if part)
        hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, said)), said)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"{path}{place}: {hint} ({_line(text, mark.line if mark else 0)})"
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # for example an invalid character or date
        return f"{path}: {' '.join(str(error).split())[:200]}"
    if content is None:
        return None
    if not isinstance(content, dict):
        return f"{path} holds {type(content).__name__}; a config is lines of `key: value`"
    if strange := next((key for key in _keys(content) if isinstance(key, str) and re.search(r":[\[{]", key)), None):
        return f"{path}: {strange!r} is read as a name: put a space behind the colon"
    tops = sorted(set(map(str, content)) & {*GROUPS, "paths", "run_name"})
    if tops and option.parts[0] in ("data", "experiment", "sweep") and not re.search(r"^#\s*@package", text, re.M):
        wrong_place = f"{option.parent}.{tops[0]}".replace("/", ".")
        return f"{path} sets {', '.join(tops)} and has no line `# @package _global_`: it would set {wrong_place}"
    return None


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return repr(lines[number].strip()[:60]) if number < len(lines) else "the end"


def _keys(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield key
            yield from _keys(child)
    elif isinstance(node, list):
        for child in node:
            yield from _keys(child)


def _chosen(option: Path, content: Any) -> Iterator[Path]:
    """The files that a file's own `defaults` choose."""
    for entry in (content or {}).get("defaults") or [] if isinstance(content, dict) else []:
        if isinstance(entry, str) and entry != "_self_":
            yield option.parent / entry if not entry.startswith("/") else Path(entry[1:])
        elif isinstance(entry, dict):
            for key, value in entry.items():
                group = str(key).removeprefix("override ").removeprefix("optional ").partition("@")[0]
                base = Path(group[1:]) if group.startswith("/") else option.parent / group
                yield from (base / str(one) for one in (value if isinstance(value, list) else [value]))


class _Loader(yaml.SafeLoader):
    """A YAML loader like OmegaConf's: a duplicate key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Check the keys first."""
        first: dict[Any, Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in first and key.tag != "tag:yaml.org,2002:merge":
                    line = first[key.value].line + 1
                    problem = f"{key.value!r} stands there twice, first in line {line}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                first[key.value] = key.start_mark
        return super().construct_mapping(node, deep)
