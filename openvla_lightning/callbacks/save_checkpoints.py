"""Checkpoints every N optimiser steps, with names that can be typed on a command line."""

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from openvla_lightning.checkpoint.disk import Queue, clear_unfinished, on_host, remove, save
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.sharded import is_sharded
from openvla_lightning.parallel import FSDP

log = logging.getLogger(__name__)
SAME_CTRL_C = 1.0
"""Seconds within which SIGINT may come twice for one Ctrl-C: from the terminal, and passed on by torchrun."""


class Terminated(SystemExit):
    """The system (SIGTERM) or the user (Ctrl-C) asked the run to end, and its last checkpoint is on the disk."""

    def __init__(self, asked: signal.Signals) -> None:
        super().__init__(128 + asked)


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin for checkpoints that one process writes.

    Args:
        asynchronous: training continues while a copy in host memory is written.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous, self.queue = asynchronous, Queue(asynchronous)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`, after the previous one.

        Raises:
            CheckpointWriteError: when this one, or in the background the previous one, cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self.wait()
        if self.asynchronous:
            checkpoint = on_host(checkpoint)
        self.queue.add(lambda: save(checkpoint, Path(path)))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint, with tensors and plain values only, on the CPU.

        Raises:
            CheckpointError: for a sharded checkpoint.
        """
        if is_sharded(path):
            problem = "it is sharded: go on from it with trainer=fsdp (trainer.devices=1 is enough), or start from its "
            raise CheckpointError(path, [f"{problem}weights with model.init_from={path}"])
        return super().load_checkpoint(path, lambda storage, _: storage, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, once the newer one is on the disk."""
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            self.queue.add(lambda: remove(Path(path)))

    def wait(self) -> None:
        """Return when all checkpoints are on the disk; raise the first error."""
        self.queue.wait()

    def teardown(self) -> None:
        """End the background thread after training."""
        self.wait()


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which writes complete files `step_000250.ckpt`, also for the last step.

    Slurm and other schedulers send SIGTERM some time before they kill a job. The present step is then finished and
    saved, the same one on all processes, and the run ends with status 143. Ctrl-C does the same, with status 130; a
    second one ends the run at once.

    Args:
        dirpath: folder.
        every_n_train_steps: optimiser steps between checkpoints.
        keep: how many of the newest checkpoints to keep; -1 keeps all.
        save_initial: also save the model before its first step, for later comparison.
        asynchronous: write in the background, from a copy in host memory, while training continues.

    Raises:
        ValueError: when no checkpoint would be kept.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int,
        keep: int = -1,
        save_initial: bool = False,
        asynchronous: bool = False,
    ) -> None:
        if keep < -1 or keep == 0:
            raise ValueError(f"keep={keep} would leave no checkpoint: -1 keeps all, 1 the newest one")
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:06d}",  # `=` would break ckpt_path=... on the command line
            auto_insert_metric_name=False,
            monitor="step" if keep > 0 else None,
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
        )
        self.save_initial = save_initial
        self.files = CheckpointFiles(asynchronous)
        self.asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._steps = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Configure how checkpoints are written; remove the incomplete ones of a killed process."""
        super().setup(trainer, pl_module, stage)
        if isinstance(trainer.strategy, FSDP):
            trainer.strategy.write_in_background(self.files.asynchronous)
        else:
            trainer.strategy.checkpoint_io = self.files
        if trainer.is_global_zero and "://" not in str(self.dirpath):
            clear_unfinished(Path(str(self.dirpath)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the untrained model, if asked."""
        super().on_train_start(trainer, pl_module)
        self._steps = trainer.global_step
        if threading.current_thread() is threading.main_thread():  # Lightning's handler ends the run without saving
            self.asked = signal.SIGTERM if trainer.received_sigterm else None
            signal.signal(signal.SIGTERM, self._note)  # which Lightning takes back after training
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
                signal.signal(signal.SIGINT, self._note)
        if self.save_initial and trainer.global_step == 0:
            trainer.save_checkpoint(f"{self.dirpath}/step_000000.ckpt", weights_only=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if number == signal.SIGINT and time.monotonic() - self._asked_at > SAME_CTRL_C:
                raise KeyboardInterrupt
            return
        self.asked, self._asked_at = signal.Signals(number), time.monotonic()
        again = " Ctrl-C again ends it at once" if number == signal.SIGINT else ""
        log.info(f"{self.asked.name}: this step is finished and written, then the run ends.{again}")

    def _forget(self) -> None:
        """Ctrl-C interrupts what comes after training."""
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every_n_train_steps` steps, and when the run is asked to end."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step != self._steps:  # not between accumulated batches
            self._steps = trainer.global_step
            self._end_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End also during validation, which may take longer than the system waits."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_if_asked(trainer)

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        """Save and end, if any process was asked to.

        Raises:
            Terminated: on all processes.
        """
        asked = self.asked is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked:
            return
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._finish(trainer)
        reason = self.asked or signal.SIGTERM  # of another process
        if trainer.is_global_zero:
            log.warning(
                f"{reason.name}: step {trainer.global_step:,} is written to {self.dirpath}, and the run ends. The same "
                "command with ckpt_path=last goes on"
            )
        raise Terminated(reason)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, if it is not saved yet, and wait until it is on the disk."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._finish(trainer)
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave Ctrl-C as it was before training."""
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    def _finish(self, trainer: L.Trainer) -> None:
        """Return when all checkpoints are on the disk."""
        if isinstance(trainer.strategy, FSDP):
            trainer.strategy.finish_checkpoints()
        else:
            self.files.wait()
