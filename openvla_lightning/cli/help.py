"""Help for the command line, from conf/: the options, and suggestions for wrong names."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

WIDTH = 110
"""Columns of the help page."""

RENAMED = {
    "lora.lr": "optim.lr",
    "lora.alpha": "strategy.alpha",
    "lora.use_rslora": "strategy.use_rslora",
    "processor.camera": "data.cameras",
}
"""Keys of earlier versions -> their present names."""

GROUPS = {
    "model": "what is trained",
    "model/vision_backbone": "its vision towers",
    "model/projector": "between towers and language model",
    "model/llm": "its language model",
    "action_head": "what actions are predicted as",
    "processor": "how pictures and prompts are prepared",
    "data": "what it learns from, and how that is served",
    "data/source": "where records are read",
    "data/mix": "datasets and their weights",
    "data/augment": "how training pictures vary",
    "data/conversations": "words that are learnt beside the steps",
    "data/curriculum": "how the mixture changes on the way",
    "optim": "optimiser and schedule",
    "quantisation": "precision of frozen weights",
    "strategy": "which weights learn",
    "trainer": "hardware, precision, length",
    "callbacks": "what watches the training",
    "logger": "where numbers go",
    "policy": "how a checkpoint acts",
    "env": "the world it acts in",
}
"""Group of options -> what it chooses."""
APPENDED = {
    "experiment": "whole recipes, with a leading +",
    "sweep": "many runs in one command, with a leading +",
    "debug": "any recipe in a minute, with a leading +",
    "launcher": "where the runs of a sweep go, with a leading +",
}
"""Groups that are not in a script's defaults and must be added with `+`."""
OWN = ("hydra", "paths", "local", "tuned")
"""Groups that users do not choose; `tuned` follows from model and strategy."""

_OF_TRAINING = {
    "+debug=tiny": "any recipe in a minute on a CPU",
    "data/mix=bridge": "train on other datasets",
    "data.global_batch_size=32": "samples in one optimiser step",
    "strategy=lora rank=64": "what learns, and how much of it",
    "optim.lr=2e-5": "learning rate",
    "trainer.max_steps=1000": "optimiser steps",
    "model.init_from=openvla/openvla-7b": "weights to start from: a run, a .ckpt, a folder, a hub id",
    "ckpt_path=last": "go on with the newest run",
    "logger=wandb": "dashboards, offline without an account",
}
USED_MOST = {
    "train": {"+experiment=oxe_full": "the paper's run", **_OF_TRAINING},
    "finetune": {"+experiment=libero_spatial_lora": "one of the paper's fine-tunings", **_OF_TRAINING},
    "evaluate": {
        "ckpt_path=runs/finetune": "a run, a .ckpt, a folder, a hub id; the newest by default",
        "env=libero_spatial": "the world",
        "tasks=[lift]": "tasks, by name or family",
        "episodes_per_task=50": "rollouts of each; auto: until the interval is narrow",
        "instructions=shuffled": "does it listen?",
        "eval.control=realtime": "the world moves on while the policy thinks",
        "quantisation=int4": "a third of the memory",
        "unnorm_key=bridge_orig": "whose action statistics, when the checkpoint holds several",
        "label=mine": "the policy's name in tables",
        "save_videos=3": "videos kept, per task family and outcome",
    },
}
"""The ten most used overrides of each script."""


def help_page(conf: str | Path, script: str, installed: bool = False) -> str:
    """The text of `--help`: commands, the most used overrides, all groups with their options.

    Args:
        conf: the folder of configs.
        script: name of the script's config, such as `train`.
        installed: whether it was called as `openvla train`, and not as `python train.py`.
    """
    header = _header(Path(conf) / f"{script}.yaml")
    lines = [header[0], "", *header[1:]]
    if script in USED_MOST:
        lines += ["", "Overrides used most:", "", *_columns(USED_MOST[script].items())]
    lines += ["", "Groups (group=option, options by the names of their files in conf/):", ""]
    names = {name: f"{says}: " for name, says in (GROUPS | APPENDED).items()}
    lines += _columns((name, names.get(name, "") + ", ".join(found)) for name, found in groups(conf, script).items())
    lines += [
        "",
        "Any value can be set: a.b=1; a new one with +a.b=1. --cfg job prints what would run, -m runs every",
        "combination of a=1,2 b=3,4, and --hydra-help lists the rest. docs/configuration.md explains.",
    ]
    page = "\n".join(lines) + "\n"
    return re.sub(r"python (\w+)\.py", r"openvla \1", page) if installed else page


def groups(conf: str | Path, script: str) -> dict[str, list[str]]:
    """Options of each group that `script` has or that can be added to it."""
    conf = Path(conf)
    defaults = yaml.safe_load((conf / f"{script}.yaml").read_text(encoding="utf-8"))["defaults"]
    of_script = [name for entry in defaults if isinstance(entry, dict) for name in entry]
    roots = [name for name in of_script if not name.startswith((*OWN, "optional"))]
    options_by_group = {}
    for root in roots:
        for folder in (conf / root, *sorted(path for path in (conf / root).iterdir() if path.is_dir())):
            options_by_group[folder.relative_to(conf).as_posix()] = options_in(folder)
    for name in APPENDED:
        files = sorted((conf / name).glob("*.yaml"))
        if name in ("experiment", "sweep"):  # each is for one script, which its first lines name
            files = [path for path in files if f" {script}.py" in path.read_text(encoding="utf-8")]
        if files and (name != "debug" or "trainer" in of_script):
            options_by_group[name] = [path.stem for path in files]
    return options_by_group


def options_in(folder: Path) -> list[str]:
    """The options of a group, whose configs are in `folder`."""
    return sorted(path.stem for path in folder.glob("[!_]*.yaml"))  # _timm is a base for others


def renamed(overrides: Sequence[str]) -> str | None:
    """A message if a key was renamed; otherwise None."""
    for text in overrides:
        key, _, value = key_and_value(text)
        if key in RENAMED:
            return f"{key} is called {RENAMED[key]} now: {RENAMED[key]}={value}"
    return None


def misspelt_addition(groups: Iterable[str], overrides: Sequence[str]) -> str | None:
    """A message if an override such as `+experimnt=x` would only add an unused value, or a second one; else None."""
    groups = set(groups)
    chosen = {name for name in groups if "/" not in name and name not in APPENDED}
    for text in overrides:
        name, equals, value = text.partition("=")
        key = name.lstrip("+")
        if name == "+debug" and key not in groups:
            return f"{text} shrinks a training, and this command trains nothing: leave it out"
        if equals and name.startswith("+") and key in chosen:
            return f"{text}: a plus adds, and one of {key} is chosen already; {key}={value} replaces it"
        if equals and key != name and key not in groups and (close := get_close_matches(key, groups, 1, 0.8)):
            meant = close[0] if close[0] in chosen else f"+{close[0]}"
            return f"there is no group {key!r}; did you mean {meant}={value}?"
    return None


def wrong_options(groups: dict[str, list[str]], overrides: Sequence[str], own: Sequence[Path] = ()) -> dict[str, str]:
    """Override -> a suggestion, for overrides that choose an unknown option of a group; `own`: users' configs."""
    suggestions = {}
    for text in overrides:
        key, _, value = key_and_value(text)
        for option in value.split(",") if key in groups and "(" not in value else ():
            if option in groups[key] or any((folder / key / f"{option}.yaml").is_file() for folder in own):
                continue
            if close := get_close_matches(option, groups[key], 3):
                meant = (f"{text.partition('=')[0]}={name}" for name in close)
                suggestions[text] = f"did you mean {' or '.join(meant)}?"
            elif re.fullmatch(r"[\w-]+", option) and option != "null":
                there = f"FOLDER/{key}/{option}.yaml"
                suggestions[text] = f"{key}={option}: a file of your own is found with --config-dir FOLDER, as {there}"
    return suggestions


def wrong_keys(known: Sequence[str], overrides: Sequence[str], conf: str | Path) -> Iterator[str]:
    """For each override of an unknown key, a suggestion, or the options with which the key exists."""
    for text in overrides:
        key, adds, _ = key_and_value(text)
        if adds or key in known or key.startswith(("hydra.", "hydra/")):
            continue
        if close := near(key, known):
            yield f"{key}: did you mean {' or '.join(close)}?"
        elif owners := sorted(_owners(key, Path(conf))):
            yield f"{key}: there is one only with {' or '.join(owners)}"


def key_and_value(override: str) -> tuple[str, bool, str]:
    """Key, whether it is added or deleted (not set), and value."""
    name, _, value = override.partition("=")
    return name.lstrip("+~").partition("@")[0], name[:1] in ("+", "~"), value


def near(key: str, known: Sequence[str]) -> list[str]:
    """At most three known keys that have the same last part, are similar, or contain `key`."""
    last = key.rpartition(".")[2]
    of_last = [name for name in known if name.rpartition(".")[2] == last]
    alike = get_close_matches(key, known, 1, 0.75) or [
        name for match in get_close_matches(last, {n.rpartition(".")[2] for n in known}, 1, 0.8)
        for name in known if name.rpartition(".")[2] == match
    ]  # fmt: skip
    holding = [name for name in known if len(last) > 3 and last in name.rpartition(".")[2]]
    return list(dict.fromkeys(of_last or alike or holding))[:3]


def _owners(key: str, conf: Path) -> Iterator[str]:
    """Options that put `key` at the top of the config."""
    for path in conf.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        if path.parent != conf and "@package _global_" in text and re.search(rf"^{re.escape(key)}:", text, re.M):
            yield f"{path.parent.relative_to(conf).as_posix()}={path.stem}"


def _header(path: Path) -> list[str]:
    """The sentence and the commands that a config begins with."""
    comments = [line[1:].rstrip() for line in path.read_text(encoding="utf-8").partition("defaults:")[0].splitlines()]
    return [comments[0].strip(), *(line for line in comments if line.startswith("   python "))]


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    left = max(len(name) for name, _ in rows)
    page = []
    for name, text in rows:
        first, *others = textwrap.wrap(text, WIDTH - left - 4, break_on_hyphens=False)
        page += [f"  {name:{left}}  {first}", *(f"  {'':{left}}  {line}" for line in others)]
    return page
