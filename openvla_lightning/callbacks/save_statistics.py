"""Writes `dataset_statistics.json` of the released layout beside the checkpoints."""

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from openvla_lightning.runtime.files import write_text


class SaveDatasetStatistics(Callback):
    """When training starts, writes the statistics of its normalisation in the released layout.

    Args:
        dirpath: folder of the run.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        statistics = trainer.datamodule.statistics  # type: ignore[attr-defined]
        self.dirpath.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: stats.to_dict() for name, stats in statistics.items()}, indent=2)
        write_text(self.dirpath / "dataset_statistics.json", text + "\n")
