"""`openvla <command> ...`: the installed package's commands, which run the same code as scripts and `-m` modules."""

import os
import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import openvla_lightning
from openvla_lightning.cli import completion

COMMANDS = {
    "train": ("openvla_lightning.cli.train", "pretrain a VLA on a mixture of robot datasets"),
    "finetune": ("openvla_lightning.cli.finetune", "adapt a pretrained VLA to one robot"),
    "evaluate": ("openvla_lightning.cli.evaluate", "roll a policy out, and report success rates"),
    "serve": ("openvla_lightning.serve", "let robots ask a policy over HTTP and WebSocket"),
    "report": ("openvla_lightning.report", "compare evaluations and sweeps in tables and pictures"),
    "data-report": ("openvla_lightning.data.report", "look at datasets before training on them"),
    "fit-fast": ("openvla_lightning.cli.fit_fast", "fit a FAST tokenizer on the actions of a mixture"),
    "export": ("openvla_lightning.model.checkpoint", "write a run in the released layout, its adapter merged"),
    "bench": ("openvla_lightning.bench_latency", "measure the latency of acting"),
    "convert": ("openvla_lightning.data.convert", "RLDS to LeRobot, LeRobot or HDF5 to RLDS"),
    "demo": ("openvla_lightning.demo", "train, fine-tune and evaluate a small VLA in a simulator"),
}
"""Command -> the module that runs it, and its description."""

OF_HYDRA = ("train", "finetune", "evaluate", "serve", "data-report", "fit-fast")
"""Commands whose options Hydra completes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command's module as `python -m` does, so that its child processes find the same module."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["completion"]:
        print(completion.script(words[1] if len(words) > 1 else "", tuple(COMMANDS), OF_HYDRA))
        return
    if not words or words[0] in ("--help", "-h", "help"):
        print(page())
        return
    if words[0] == "--version":
        print(f"openvla-lightning {openvla_lightning.__version__}")
        return
    if words[0] not in COMMANDS:
        close = get_close_matches(words[0], COMMANDS, 1)
        meant = f"; did you mean openvla {close[0]}?" if close else ""
        raise SystemExit(f"error: openvla has no command {words[0]!r}{meant}\n\n{page()}")
    module = COMMANDS[words[0]][0]
    first = ["export"] if words[0] == "export" else []
    sys.argv = [f"openvla {words[0]}", *first, *words[1:]]
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise SystemExit("error: the working folder was removed: change to one that exists, as with cd ~") from None
    if here not in sys.path:
        sys.path.append(here)  # a lab's package may be in the working folder; it must not hide others' modules
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def page() -> str:
    """The output of `openvla` without a command."""
    width = max(map(len, COMMANDS))
    rows = [f"  openvla {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    rows.append(f'  openvla {"completion":{width}}  complete words in a shell: eval "$(openvla completion bash)"')
    first = "Train, fine-tune, evaluate and serve vision-language-action models."
    return "\n".join([first, "", *rows, "", "openvla <command> --help says more about each."])


if __name__ == "__main__":
    main()
