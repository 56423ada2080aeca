"""What users type and write: it composes to what was meant, or one line says how to write it.

OPENVLA_HOSTILE=1000 draws that many override strings and YAML fragments instead of a hundred of each.
"""

import os
import random
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openvla_lightning.cli import help
from openvla_lightning.cli.command import hints
from openvla_lightning.cli.overrides import OverrideError, readable
from openvla_lightning.cli.written import unreadable, wrong
from openvla_lightning.config import CONF
from openvla_lightning.run.early import wrong_types

COUNT = int(os.environ.get("OPENVLA_HOSTILE", "100"))
TOGETHER = 10
"""Overrides in one composition, which costs most of the time."""

PIECES = [
    "a",
    "runs",
    "Müller",
    "用户",
    " ",
    "=",
    ",",
    "'",
    '"',
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "#",
    "&",
    "%",
    "~",
    "\\",
]
PIECES += ["/", "/", "-", ".", ":", "@", "+", "*", "?", "!", "$", "|", ";", "0", "7", "1e5", "null", "é", "\t"]
WORDS = ["007", "1e5", "2024", "2024-01-01", "12.0", "1_000", "yes", "on", "True", "nan", "my robot", "it's", "ä ö ü"]
TEXTS = ["run_name", "label", "ckpt_path", "paths.data_dir", "model.init_from", "unnorm_key"]


def text(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(WORDS)
    body = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 9)))
    return rng.choice([body, "/" + body, "~/" + body, "/data/" + body, f"'{body}'", f'"{body}"'])


def override(rng: random.Random, script: str) -> tuple[str, str, Any]:
    """Key, the word as the program receives it, and what it means."""
    texts = ["run_name", "paths.data_dir", "ckpt_path", *(["label", "unnorm_key"] if script == "evaluate" else [])]
    kind = rng.choice(["text"] * 6 + ["number", "list", "null", "truth", "dictionary"])
    if kind == "text":
        key, value = rng.choice(texts), text(rng)
        return key, f"{key}={value}", value
    if kind == "null":
        return "ckpt_path", f"ckpt_path={rng.choice(['null', 'NULL', 'Null'])}", None
    if kind == "truth":
        value = rng.choice(["true", "false", "True", "FALSE"])
        key = "eval.self_test" if script == "evaluate" else "estimate"
        return key, f"{key}={value}", value.lower() == "true"
    if kind == "number":
        value = rng.choice([1e-4, 3, 0.5, -1, 100000])
        key = "seed" if isinstance(value, int) else ("interval_width" if script == "evaluate" else "optim.lr")
        return key, f"{key}={value}", value
    names = [rng.choice(["lift", "öffnen", "push_red", "a-b", "C3"]) for _ in range(rng.randrange(1, 4))]
    if kind == "dictionary":
        return (
            "+extra",
            f"+extra={{{', '.join(f'{n}: {i}' for i, n in enumerate(sorted(set(names))))}}}",
            {n: i for i, n in enumerate(sorted(set(names)))},
        )
    glue = rng.choice([",", ", ", " , "])
    return "+names", f"+names=[{glue.join(names)}]", names


def composed(script: str, words: list[str]) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(script, words)


def plain(cfg: Any, key: str) -> Any:
    """A value as it stands there, or where it is text with a variable in it, what it comes to."""
    value = OmegaConf.select(cfg, key.lstrip("+"))
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@pytest.mark.parametrize("seed", range(-(-COUNT // TOGETHER)))
def test_an_override_is_what_was_meant_or_a_line_says_how_to_write_it(seed: int) -> None:
    rng = random.Random(seed)
    script = rng.choice(["train", "evaluate"])
    drawn, taken, tried = {}, set[str](), 0
    while tried < TOGETHER:
        tried += 1
        key, word, value = override(rng, script)
        try:
            (prepared,) = readable([word])
        except OverrideError as error:
            check_line(word, value, error)
            continue
        if key not in taken:
            taken.add(key)
            drawn[key] = (prepared, word, value)
    try:
        cfg = composed(script, [prepared for prepared, _, _ in drawn.values()])
    except HydraException:
        for prepared, word, value in drawn.values():  # which of them?
            check_alone(script, prepared, word, value)
        return
    for key, (_, word, value) in drawn.items():
        check_value(cfg, key, word, value)


def check_value(cfg: Any, key: str, word: str, value: Any) -> None:
    if "$" in word:  # a variable: what it comes to, or that there is none, OmegaConf says in a line
        return
    found = plain(cfg, key)
    quoted = isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    same = found == value or found == str(value).strip() or (quoted and found == unquoted(value))
    told = bool(wrong_types(cfg))
    assert same or told, f"{word!r} means {value!r} and became {found!r}"


def unquoted(value: str) -> str:
    """Quotes that reach the program are Hydra's: a backslash before one of them is not said."""
    return re.sub(r"(\\+)(?=['\"]|$)", lambda found: found[1][: len(found[1]) // 2], value[1:-1])


def check_alone(script: str, prepared: str, word: str, value: Any) -> None:
    try:
        composed(script, [prepared])
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error)
        assert said
        assert len(said.splitlines()) <= 8, said
        assert "Traceback" not in said


def check_line(word: str, value: Any, error: OverrideError) -> None:
    """What the line says to write is read as what was meant."""
    said = str(error)
    if found := re.search(r"quote it: (.*)", said, re.S):
        (prepared,) = readable(shlex.split(found[1]))
        read = OverridesParser.create().parse_override(prepared).value()
        assert str(read) == str(value), (word, prepared, read)
    else:
        assert "YAML file" in said or "sets nothing" in said or "the name of a setting" in said or "no option" in said


def test_wrong_names_are_answered_with_what_was_meant() -> None:
    rng = random.Random(0)
    known = ["trainer.max_steps", "optim.lr", "data.global_batch_size", "strategy", "logger"]
    for _ in range(3):
        key = rng.choice(known[:3])
        place = rng.randrange(len(key) - 4, len(key) - 1)
        assert any(key in hint for hint in hints("train", [key[:place] + key[place + 1 :] + "=3"]))


SLIPS = [
    "tab",
    "latin",
    "colon",
    "twice",
    "quote",
    "close",
    "nospace",
    "at",
    "backslash",
    "list",
    "short",
    "bom",
    "crlf",
]


def tree(rng: random.Random, depth: int = 0) -> Any:
    names = ["data", "label", "mix", "my robot", "Öffner", "lr", "tasks", "a/b", "2024", "state"]
    kinds = ["text", "number", "list", "null", "truth"] + (["tree"] * 3 if depth < 2 else [])
    found: dict[str, Any] = {}
    for name in rng.sample(names, rng.randrange(1, 5)):
        kind = rng.choice(kinds)
        found[name] = {
            "text": lambda: text(rng).replace("\t", " ").replace("${", "$").replace("1e5", "1e5 m"),
            "number": lambda: rng.choice([1, 2.5, 1e-4, 0, -3, 100_000]),
            "list": lambda: [rng.choice(["lift", "ü", 3, None, True]) for _ in range(rng.randrange(4))],
            "null": lambda: None,
            "truth": lambda: rng.random() < 0.5,
            "tree": lambda: tree(rng, depth + 1),
        }[kind]()
    return found


def slipped(rng: random.Random, written: str) -> tuple[bytes, str]:
    """A fragment as a person might write it, with one slip."""
    lines, slip = written.splitlines(), rng.choice(SLIPS)
    at = rng.randrange(len(lines))
    if slip == "latin":
        return (written + "wer: Müller\n").encode("latin-1", "replace"), slip
    if slip == "bom":
        return b"\xef\xbb\xbf" + written.encode(), slip
    if slip == "crlf":
        return written.replace("\n", "\r\n").encode(), slip
    lines[at:at] = {
        "tab": ["\tx: 1"],
        "colon": ["note: a: b"],
        "twice": ["again: 1", "again: 2"],
        "quote": ['say: "abc'],
        "close": ["say: [a, b"],
        "nospace": ["mix:{d: 1.0}"],
        "at": ["who: @me"],
        "backslash": ['where: "C:\\data\\x"'],
        "list": ["- a"],
        "short": [written[: rng.randrange(len(written))]],
    }[slip]
    return "\n".join(lines).encode(), slip


def test_a_fragment_is_read_as_omegaconf_reads_it_or_one_line_says_where(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(COUNT):
        rng = random.Random(seed)
        content = tree(rng)
        written = yaml.safe_dump(content, allow_unicode=True, default_flow_style=rng.choice([None, False]), width=60)
        path = tmp_path / f"mix_{seed}.yaml"
        meant: Any = content
        body, slip = written.encode(), ""
        if rng.random() < 0.6:
            body, slip = slipped(rng, written)
            meant = None
        path.write_bytes(b"# @package _global_\n" * (slip != "bom") + body)
        problem = wrong(path, Path("data/mix") / path.stem)
        outcomes["told" if problem else "read"] += 1
        if problem is not None:
            assert meant is None, (seed, problem)
            assert problem.startswith(str(path))
            assert len(problem.splitlines()) == 1
            assert len(problem) < 400
            continue
        found = OmegaConf.load(path)  # what Hydra does; it may not fail where nothing was said
        if meant is not None:
            assert OmegaConf.to_container(found) == meant, seed
    assert min(outcomes.values()) > COUNT // 10, outcomes


def options() -> Iterator[str]:
    for script in ("train", "finetune", "evaluate"):
        for group, names in help.groups(CONF, script).items():
            plus = "+" if group in help.APPENDED else ""
            yield from (f"{plus}{group}={name}" for name in names)


def test_our_own_configs_are_without_slips() -> None:
    for word in sorted(set(options())):
        assert unreadable([word], [Path(CONF)]) is None


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("data:\n  mix: {d: 1.0}\n", "has no line `# @package _global_`"),
        ("# @package _global_\ndata:\n\tmix: {d: 1.0}\n", "line 3, column 1: indent with spaces"),
        ("# @package _global_\ndata:\n  mix:{d: 1.0}\n", "put a space behind the colon"),
        ("# @package _global_\ndata: {mix: {a: 1}, mix: {b: 1}}\n", "'mix' stands there twice, first in line 2"),
        ("defaults: [other]\n", "other.yaml, line 1, column 6: a value that begins so"),
    ],
)
def test_a_chosen_file_is_looked_at(tmp_path: Path, written: str, said: str) -> None:
    folder = tmp_path / "data" / "mix"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(written)
    (folder / "other.yaml").write_text("who: @me\n")
    problem = unreadable(["--config-dir", str(tmp_path), "data/mix=mine"], [])
    assert problem is not None
    assert said in problem
    assert unreadable(["--config-dir", str(tmp_path), "data/mix=bridge"], []) is None
