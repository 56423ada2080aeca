"""How long validation and checkpoints hold training up, beyond the validation's own batches.

    python benchmarks/stalls.py                                            # the laptop's recipe: python train.py
    python benchmarks/stalls.py --every 4 data.global_batch_size=8         # further words are overrides of train.py

It is train.py, once with checkpoints that are written before training goes on and once with those in the background.
A turn is the time from one step's beginning to the next one's; medians in milliseconds. A held-out batch has no step's
backward pass, so its time is taken out of a turn with validation, and what is left is the stall.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback

from openvla_lightning import plugins
from openvla_lightning.config import CONF
from openvla_lightning.report.tables import markdown

WARM_UP = 4
"""First turns, which make what is made once."""
KINDS = ("a step alone", "with validation, its batches taken out", "with a checkpoint")
TIMES: dict[str, dict[str, list[float]]] = {}


class Stalls(Callback):
    """Notes the time of every turn by what happened in it."""

    def __init__(self, way: str) -> None:
        self.times = TIMES.setdefault(way, {kind: [] for kind in KINDS})
        self.began: list[float] = []
        self.batch_began = self.held_out = 0.0
        self.validated = self.saved = False

    def on_train_batch_start(self, *_: Any) -> None:
        """A turn ends and the next one begins."""
        now = time.perf_counter()
        if len(self.began) > WARM_UP and not (self.validated and self.saved):
            kind = KINDS[1] if self.validated else KINDS[2] if self.saved else KINDS[0]
            self.times[kind].append(now - self.began[-1] - self.held_out)
        self.began.append(now)
        self.held_out, self.validated, self.saved = 0.0, False, False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """This turn validates."""
        self.validated = True

    def on_validation_batch_start(self, *_: Any) -> None:
        """A held-out batch begins."""
        self.batch_began = time.perf_counter()

    def on_validation_batch_end(self, *_: Any) -> None:
        """A held-out batch ends."""
        self.held_out += time.perf_counter() - self.batch_began

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """This turn saves."""
        self.saved = True


def main() -> None:
    """Train twice and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints; validations are between them")
    parser.add_argument("overrides", nargs="*", help="of train.py")
    told = parser.parse_intermixed_args()
    plugins.add(["stalls"])
    from stalls import TIMES  # this file is __main__ here, and the callback's module has another name

    from openvla_lightning.run.fit import fit

    rows = [["checkpoints", "MB", *KINDS]]
    for way, background in (("before training goes on", False), ("in the background", True)):
        with tempfile.TemporaryDirectory() as folder, initialize_config_dir(CONF, version_base="1.3"):
            own = [
                "+callbacks.stalls._target_=stalls.Stalls",
                f"+callbacks.stalls.way={way}",
                f"callbacks.checkpoint.asynchronous={background}",
                "callbacks.checkpoint.keep=1",
                f"trainer.max_steps={told.steps}",
                f"trainer.val_check_interval={told.every - 1}",
                f"save_every={told.every}",
                f"paths.output_dir={folder}/runs/run",
                f"paths.log_dir={folder}/runs",
            ]
            fit(compose("train", [*own, *told.overrides]))
            size = max(path.stat().st_size for path in Path(folder).rglob("*.ckpt")) / 1e6
        medians = [statistics.median(TIMES[way][kind]) for kind in KINDS]
        rows.append([way, f"{size:,.0f}", *(f"{1e3 * seconds:,.0f}" for seconds in medians)])
    print(f"\n{markdown(rows)}")


if __name__ == "__main__":
    main()
