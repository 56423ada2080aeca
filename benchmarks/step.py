"""Where a training step's time goes: CPU seconds of data, forward, backward, optimiser, and all that is none of these.

    python benchmarks/step.py                                # the laptop's recipe: python train.py
    python benchmarks/step.py --steps 50 logger=tensorboard  # further words are overrides of train.py

It is train.py with its callbacks and loggers, so what is measured is what runs. The host's line is Lightning's loop,
metrics, callbacks and logging: on a GPU it has to fit beside the device's work. Batches are made by other processes,
whose time is not the step's; `data` is what this one does to take them, and augmentation. Medians of steps, but the
host's mean, since logging comes every few steps.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher

from openvla_lightning import plugins
from openvla_lightning.config import CONF
from openvla_lightning.report.tables import markdown

SKIPPED = 10
"""First steps, which make what is made once; logging does so at the tenth."""
HOST = "host: loop, metrics, callbacks, logging"
PHASES = ("data", "forward", "backward", "optimiser", HOST)


class Phases(Callback):
    """Counts the process' CPU time by what it is spent on, and prints a table when training ends."""

    def __init__(self) -> None:
        self.inside = [HOST]
        self.steps: list[dict[str, float]] = []
        self.since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put a clock around everything that is not the host's."""
        module: Any = pl_module
        (optimizer,) = trainer.optimizers
        for owner, name, phase in (
            (_PrefetchDataFetcher, "__next__", "data"),
            (module, "transfer_batch_to_device", "data"),
            (trainer.datamodule, "on_after_batch_transfer", "data"),  # augmentation, on the device
            (module, "forward", "forward"),
            (trainer.strategy, "backward", "backward"),
            (module, "configure_gradient_clipping", "optimiser"),
            (torch.nn.utils, "get_total_norm", "optimiser"),
            (optimizer, "zero_grad", "optimiser"),
        ):
            setattr(owner, name, self.counted(getattr(owner, name), phase))
        step = optimizer.step
        optimizer.step = self.counted(lambda closure: step(closure=self.counted(closure, HOST)), "optimiser")
        self.since = time.process_time()
        self.steps.append(dict.fromkeys(PHASES, 0.0))

    def counted(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """`function`, whose own time counts as this phase's."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.inside.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self.inside.pop()

        return call

    def turn(self) -> None:
        """Time up to now belongs to what was going on."""
        now = time.process_time()
        self.steps[-1][self.inside[-1]] += now - self.since
        self.since = now

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A step ends where the next one begins, so the later callbacks of this one are counted with the next one."""
        self.turn()
        self.steps.append(dict.fromkeys(PHASES, 0.0))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say it."""
        steps = self.steps[SKIPPED:-1]
        total = statistics.median(sum(step.values()) for step in steps)
        rows = [["phase", "ms", "share"]]
        for phase in PHASES:
            values = [step[phase] for step in steps]
            taken = statistics.mean(values) if phase == HOST else statistics.median(values)
            rows.append([phase, f"{1e3 * taken:.1f}", f"{taken / total:.1%}"])
        size = sum(parameter.numel() for parameter in pl_module.parameters()) / 1e6
        print(f"\n{size:.0f} M parameters, {trainer.datamodule.global_batch_size} samples a step, {len(steps)} steps")
        print(f"{markdown([*rows, ['step', f'{1e3 * total:.1f}', '']])}")


def main() -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", help="of train.py")
    told = parser.parse_intermixed_args()
    plugins.add(["step"])
    steps = told.steps + SKIPPED
    own = [
        "+callbacks.phases._target_=step.Phases",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps + 1}",
        f"save_every={steps + 1}",
    ]
    from openvla_lightning.run.fit import fit

    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(CONF, version_base="1.3"):
        own += [f"paths.output_dir={folder}/runs/run", f"paths.log_dir={folder}/runs"]
        fit(compose("train", [*own, *told.overrides]))


if __name__ == "__main__":
    main()
