"""A training that writes down every batch it was given; killed and started again by the test of resumption.

python resumable.py DATA_DIR RUN_DIR STEPS SECONDS_PER_STEP
"""

import hashlib
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
import toy_rlds
from lightning.pytorch.callbacks import ModelCheckpoint

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.types import Batch, Step

NAMES = ("one", "two", "three")


def collate(steps: list[Step]) -> Batch:
    """A batch without words."""
    pixels = torch.from_numpy(np.stack([step.observation.images["primary"] for step in steps])).permute(0, 3, 1, 2)
    actions = torch.from_numpy(np.stack([step.action for step in steps]))
    ids = torch.zeros(len(steps), 1, dtype=torch.long)
    names, numbers = [step.dataset_name for step in steps], [step.number for step in steps]
    return Batch(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=ids.bool(),
        places=ids[:, :0],
        labels=ids,
        actions=actions,
        dataset_names=names,
        numbers=numbers,
    )


class Diary(L.LightningModule):
    """Learns nothing; notes the number of each step and a digest of its batch."""

    def __init__(self, path: Path, pause: float) -> None:
        super().__init__()
        self.path, self.pause, self.weight = path, pause, torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        seen = hashlib.sha256(batch.actions.numpy().tobytes() + batch.pixel_values.numpy().tobytes())
        with self.path.open("a") as diary:
            diary.write(f"{self.global_step} {seen.hexdigest()} {' '.join(batch.dataset_names)}\n")
        time.sleep(self.pause)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def main(data: Path, run: Path, steps: int, pause: float) -> None:
    datamodule = VLADataModule(
        partial(RLDS, data),
        mix={"one": 1.0, "two": 2.0},
        curriculum=[{"after": 0.125, "mix": {"two": 0.0, "three": 3.0}}],
        datasets=dict.fromkeys(NAMES, toy_rlds.SPEC),
        collate=collate,
        image_size=toy_rlds.SIZE,
        global_batch_size=6,
        num_workers=2,
        augment={"random_brightness": [0.2]},
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(run, "{step}", every_n_train_steps=3, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=run,
    )
    found = sorted(run.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    trainer.fit(Diary(run / "diary.txt", pause), datamodule, ckpt_path=found[-1] if found else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
