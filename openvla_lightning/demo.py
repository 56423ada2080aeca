"""`make demo`: run all steps from nothing to a table of success rates, with the commands that a user would type.

python -m openvla_lightning.demo
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.cli.overrides import quoted
from openvla_lightning.report.tables import say
from openvla_lightning.report.writing import compare
from openvla_lightning.run.folders import log_dir

BOTH = "env=tabletop,tabletop_finetune"


def main() -> None:
    """Run all commands; stop at the first one that fails, after its own error message."""
    about = "Train, fine-tune and evaluate a small VLA in a simulator, into the folder of runs; it takes no options."
    argparse.ArgumentParser("openvla demo", description=about).parse_args()
    console, started = Console(), time.monotonic()
    runs = log_dir()  # set by OPENVLA_LIGHTNING_ROOT or conf/local
    demo = runs / "demo"
    shutil.rmtree(demo, ignore_errors=True)  # an evaluation would resume there, and refuse another demo's episodes
    run(console, "Pretrain a small VLA", "train", "callbacks.checkpoint.save_initial=true")
    pretrained = newest(runs / "train")
    run(console, "Fine-tune it for new tasks on another robot", "finetune", "strategy=lora", "rank=32")
    finetuned = newest(runs / "finetune")
    run(console, "Fine-tune that for chunks: four actions in one pass", "finetune", "+experiment=tabletop_chunks")
    chunks = newest(runs / "chunks")
    untrained = pretrained.with_name("step_000000.ckpt")
    for label, checkpoint in {"untrained": untrained, "pretrained": pretrained, "fine-tuned": finetuned}.items():
        # the first two have only the first robot's statistics; the third has those of both
        units = [] if label == "fine-tuned" else ["unnorm_key=tabletop_pretrain"]
        evaluate(console, f"Evaluate the {label} policy on both sets of tasks", demo, label, checkpoint, BOTH, *units)
    title, new = "Evaluate the policy with chunks on the new tasks", "env=tabletop_finetune"
    evaluate(console, title, demo, "chunks of 4", chunks, new, "unnorm_key=tabletop_steady")
    title = "Does it listen? The same, told another episode's instruction"
    evaluate(console, title, demo, "pretrained", pretrained, "env=tabletop", "instructions=shuffled")
    console.print(Rule("Results"))
    report = compare([demo], demo, console)
    minutes = (time.monotonic() - started) / 60
    say(console, f"\n{minutes:.1f} minutes. Report: {report}, picture: {demo}/success.png, videos: {demo}/*/*/videos")


def evaluate(console: Console, title: str, demo: Path, label: str, checkpoint: Path, *overrides: str) -> None:
    """Evaluate a checkpoint; results go into a folder below the demo's."""
    folder = demo / "_".join([label, *(o.partition("=")[2] for o in overrides if o.startswith("instructions"))])
    where = f"hydra.sweep.dir={quoted(str(folder))}"
    run(console, title, "evaluate", "-m", f"ckpt_path={quoted(str(checkpoint))}", f"label={label}", *overrides, where)


def run(console: Console, title: str, *command: str) -> None:
    """Print a command and run it in its own process."""
    console.print(Rule(title))
    console.print(f"$ openvla {' '.join(command)}", style="bold", highlight=False, markup=False, soft_wrap=True)
    try:
        code = subprocess.run([sys.executable, "-m", "openvla_lightning.cli", *command]).returncode
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    if code != 0:
        sys.exit(code)


def newest(folder: Path) -> Path:
    """The newest checkpoint of the training in `folder`."""
    path = newest_checkpoint(folder)
    assert path is not None, f"training left no checkpoint below {folder}"
    return path


if __name__ == "__main__":
    main()
