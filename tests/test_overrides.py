"""What is typed composes to what was meant, or one line says how to write it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from openvla_lightning.cli.overrides import OverrideError, quoted, readable

ROOT = Path(__file__).parents[1]


def meant(text: str) -> object:
    return OverridesParser.create().parse_override(text).value()


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30).filter(lambda t: "${" not in t))
@example("it's \\' a\\\\' b\\")
@example("/a=b,c [1]/{x}/ü/用户/~ &#%")
def test_a_quoted_value_is_read_as_it_is(value: str) -> None:
    assert str(meant(f"key={quoted(value)}")) == value


PATHS = [
    "/home/müller/rlds",
    "~/rlds",
    "/data/lr=1e-4/step-40-loss=0.22.pt",
    "runs (copy)/t",
    "用户/a",
    "/x#1/a&b/[c]/{d}",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_read_as_it_is(path: str) -> None:
    (word,) = readable([f"model.init_from={path}"])
    assert meant(word) == path


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0$"), min_size=1, max_size=20).filter(
        lambda text: text.strip()[:1] not in ("[", "{")  # meant as lists and dictionaries
    )
)
def test_any_value_is_read_or_a_line_says_how_to_write_it(value: str) -> None:
    try:
        (word,) = readable([f"key={value}"])
    except OverrideError as error:
        (command,) = re.findall(r"quote it: (.*)", str(error), re.S)
        assert str(meant(shlex.split(command)[0])) == value
    else:
        assert word in (f"key={value}", f"key={quoted(value)}")


def test_texts_in_a_list_need_no_quotes() -> None:
    assert meant(readable(["tasks=[öffnen, lift, my task's]"])[0]) == ["öffnen", "lift", "my task's"]
    assert meant(readable(["env={a: öffnen, b: [1, 'x y']}"])[0]) == {"a": "öffnen", "b": [1, "x y"]}
    with pytest.raises(OverrideError, match="names in a dictionary are ASCII"):
        readable(["env={öffnen: 1}"])


def test_texts_that_look_like_numbers_stay_texts() -> None:
    for word in ("run_name=007", "label=1e5", "paths.data_dir=2024", "unnorm_key=true", "ckpt_path=1_0"):
        assert meant(readable([word])[0]) == word.partition("=")[2]
    assert meant(readable(["ckpt_path=null"])[0]) is None
    assert meant(readable(["seed=7"])[0]) == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_steps", "60"], "no option --max_steps: settings are written without dashes"),
        (["trainer.max_steps", "60"], "'trainer.max_steps' sets nothing: write trainer.max_steps=60"),
        (["label=my policy (2)"], r"quote it: 'label='\"'\"'my policy \(2\)'\"'\"''"),
        (["a b=1"], "the name of a setting is letters"),
    ],
)
def test_what_cannot_be_read_is_explained(words: list[str], said: str) -> None:
    with pytest.raises(OverrideError, match=said):
        readable(words)


def test_what_hydra_reads_is_left_alone() -> None:
    words = ["-m", "+experiment=x", "~callbacks.progress", "optim.lr=1e-4,2e-4", "tasks=[lift,push]", "--cfg", "job"]
    words += ["evaluate_after={env: tabletop}", "--config-dir", "/a b/ü=1", "a='x=y'", "seed=range(1,4)"]
    options = ["-m", "--cfg", "job", "--config-dir", "/a b/ü=1"]
    assert readable(words) == [*options, *(word for word in words if word not in options)]


def test_the_command_line_ends_with_one_line() -> None:
    command = [sys.executable, "train.py", "label=a=b"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'label=a=b' cannot be read")
    assert len(done.stderr.splitlines()) == 1
    command = [
        sys.executable,
        "finetune.py",
        "model.init_from=~/müller/loss=0.22.pt",
        "--cfg",
        "job",
        "--package",
        "model",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "init_from: ~/müller/loss=0.22.pt" in done.stdout
