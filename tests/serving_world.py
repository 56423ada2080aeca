"""A server in a process of its own, with a tiny policy that answers each image differently."""

import os
import re
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
import warm_scripts
from tiny_parts import TOWERS, tiny_vla

from openvla_lightning.action_head import TokenHead
from openvla_lightning.processor import Processor
from openvla_lightning.statistics import DatasetStatistics

SCRIPT = "openvla_lightning/serve/__main__.py"
TOKEN = "a secret"


def statistics(scale: float) -> DatasetStatistics:
    actions = np.linspace(-scale * np.arange(1, 8), scale * np.arange(2, 9), 101)
    return DatasetStatistics.from_array(actions, mask=[True] * 6 + [False])


@dataclass
class Running:
    """A server: its process, its address, what it prints."""

    process: BaseProcess
    url: str
    log: Path

    def end(self, sig: int = signal.SIGTERM) -> int | None:
        assert self.process.pid is not None
        os.kill(self.process.pid, sig)
        self.process.join(20)
        return self.process.exitcode


def start(checkpoint: Path, log: Path, *overrides: str) -> Running:
    told = [f"ckpt_path={checkpoint}", f"paths.log_dir={log.parent}", "policy.device=cpu", *overrides]
    process = warm_scripts.start(SCRIPT, log, *([] if "server.port" in str(overrides) else ["server.port=0"]), *told)
    deadline = time.monotonic() + 60
    while (ready := re.search(r"Ready: (http://\S+)/act", log.read_text() if log.exists() else "")) is None:
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return Running(process, ready[1], log)


def save_checkpoint(folder: Path) -> Path:
    """A checkpoint in the released layout, with two datasets' statistics."""
    vla = tiny_vla().eval()
    with torch.no_grad():  # untrained answers hardly move with the image; larger weights make them
        for parameter in vla.parameters():
            parameter.mul_(3.0)
    latest = {**statistics(0.01).to_dict(), "latest": True}
    vla.norm_stats = {"bridge_orig": latest, "fractal": statistics(1.0).to_dict()}
    vla.save_pretrained(
        folder, Processor(TokenHead(vocab_size=768, num_bins=256), tokenizer="tiny", image_size=32, towers=TOWERS)
    )
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
