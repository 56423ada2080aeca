"""A training of three datasets, one of them LeRobot, that notes what it was given; for test_chaos.py to disturb."""

import errno
import hashlib
import logging
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
import toy_lerobot
import toy_rlds
from resumable import collate

from openvla_lightning.callbacks import Checkpoint
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.data import VLADataModule
from openvla_lightning.data.source.formats import stored
from openvla_lightning.types import Batch

STEPS, EVERY = 24, 3
FULL = 60_000
"""Bytes that a file may have where the disk is full; a checkpoint has more, a diary fewer."""


class Diary(L.LightningModule):
    """Learns what it is given; notes each step, a digest of its batch, and the weight before it."""

    def __init__(self, path: Path, pause: float) -> None:
        super().__init__()
        self.path, self.pause, self.weight = path, pause, torch.nn.Parameter(torch.zeros(20_000))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Note and learn."""
        content = batch.actions.numpy().tobytes() + batch.pixel_values.numpy().tobytes()
        with self.path.open("a") as diary:
            weight = self.weight[0].item()
            diary.write(f"{self.global_step} {hashlib.sha256(content).hexdigest()} {weight:.9g}\n")
        time.sleep(self.pause)
        return (self.weight * batch.actions.mean()).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Look."""
        time.sleep(self.pause)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Momentum, so that a state lost would show."""
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def write(folder: Path) -> Path:
    """The three datasets."""
    toy_rlds.write(folder / "one" / "1.0.0")
    toy_rlds.write(folder / "two" / "1.0.0")
    toy_lerobot.write(folder / "three")
    return folder


def train(data: Path, run: Path, workers: int, pause: float) -> None:
    """Train to the end, going on from the newest checkpoint."""
    specs = {"one": toy_rlds.SPEC, "two": toy_rlds.SPEC, "three": {**toy_lerobot.described("three")}}
    datamodule = VLADataModule(
        partial(stored, data),
        mix={"one": 1.0, "two": 1.0, "three": 1.0},
        datasets=specs,
        collate=collate,
        image_size=toy_rlds.SIZE,
        global_batch_size=4,
        num_workers=workers,
        noop_filter="none",
        limit_val_samples=8,
    )
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        callbacks=[Checkpoint(str(run / "checkpoints"), EVERY)],
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=run,
    )
    trainer.fit(Diary(run / "diary.txt", pause), datamodule, ckpt_path=newest_checkpoint(run))


def started(
    data: Path, run: Path, log: Path, prepare: Callable[[], None], pause: float = 0.02, workers: int = 0
) -> int:
    """A process that trains; its number. `prepare` is what is wrong with its world."""
    run.mkdir(parents=True, exist_ok=True)
    if child := os.fork():
        return child
    os.setsid()  # so that a signal to all its processes reaches no others
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that no other started
    code = 1
    try:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        logging.basicConfig(level=logging.INFO, force=True, stream=sys.stderr)
        prepare()
        train(data, run, workers, pause)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def calm() -> None:
    """Nothing is wrong."""


def full_disk() -> None:
    """No file grows beyond some bytes, as where there is no room."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))


def stale_handles(seed: int) -> None:
    """A network disk forgets now and then what it called a file; asked again, it knows."""
    rng, read, forgot = random.Random(seed), os.pread, False

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal forgot
        forgot = not forgot and rng.random() < 0.1
        if forgot:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(descriptor, length, offset)

    os.pread = pread


def clock_set_back(seed: int) -> None:
    """Each look at the clock may show an earlier hour than the one before."""
    rng, now = random.Random(seed), time.time
    time.time = lambda: now() - rng.choice([0, 0, 3600, 7200])
