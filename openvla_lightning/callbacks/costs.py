"""The costs of a run (parameters, memory, time per step), for the report on a sweep."""

import resource
from collections import deque
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from openvla_lightning.callbacks.clock import Clock
from openvla_lightning.model.parameters import count
from openvla_lightning.report.sweeps import FILE_NAME
from openvla_lightning.runtime.files import write_json

WARM_UP = 5
"""First steps that are not timed, because allocators and caches fill."""
TIMED = 1000
"""Number of last steps that are timed."""
RESET_PEAK = "5"  # written to clear_refs: see proc(5)
SWITCH = Path("/proc/self/clear_refs")


class Costs(Callback):
    """Writes `costs.json` when training ends.

    It holds `parameters`, `trainable`, `checkpoint_bytes` (of the newest one), `peak_memory_bytes` since the model was
    built, `memory_of` (`gpu`: memory allocated by torch; `process`: the whole resident memory), `step_seconds` (median
    of optimiser steps, without validation and checkpoints) and `steps`.

    Args:
        dirpath: folder of the run.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)
        self.clock = Clock(on_gpu=torch.cuda.is_available())
        self.steps: deque[tuple[Any, Any]] = deque(maxlen=TIMED)
        self.started: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset the peak memory of this process."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif SWITCH.exists():
            with suppress(OSError):  # some containers show it and let nobody write: the peak is then of the process
                SWITCH.write_text(RESET_PEAK, encoding="utf-8")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock, unless an earlier batch of the same optimiser step did."""
        self.started = self.started or self.clock.mark()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time of an optimiser step when it is complete."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or self.started is None:
            return
        self.steps.append((self.started, self.clock.mark()))
        self.started = None

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        everything, learning = count(pl_module.vla)  # type: ignore[arg-type]
        checkpoints = sorted(self.dirpath.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        on_gpu = self.clock.on_gpu
        seconds = [self.clock.seconds(*step) for step in self.steps]
        costs = {
            "parameters": everything,
            "trainable": learning,
            "checkpoint_bytes": checkpoints[-1].stat().st_size if checkpoints else None,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
            "memory_of": "gpu" if on_gpu else "process",
            "step_seconds": median(seconds[WARM_UP:] or seconds) if seconds else None,
            "steps": trainer.global_step,
        }
        self.dirpath.mkdir(parents=True, exist_ok=True)
        write_json(self.dirpath / FILE_NAME, costs)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process; on Linux since the last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(next(lines).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # pragma: no cover
