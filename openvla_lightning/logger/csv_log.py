"""The CSV log that every run writes."""

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.utilities import rank_zero_only

warnings.filterwarnings("ignore", ".*Previous log files in this directory will be deleted")  # not by the class below


class CSVLogger(LightningCSVLogger):
    """Lightning's CSVLogger, which deletes the log of a run that is resumed; this one joins the curve.

    Rows of an earlier attempt in the same folder are kept up to the first step that is logged anew.

    Args:
        save_dir: the run's folder; the log is `<save_dir>/metrics.csv`.
        flush_logs_every_n_steps: rows lost to a kill, at most.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 1) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        log = Path(self.log_dir) / "metrics.csv"
        self._earlier: list[dict[str, str]] = []
        if log.exists():
            with log.open(newline="") as file:
                self._earlier = list(csv.DictReader(file))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """As in Lightning; the first call after a resume puts the earlier rows in front."""
        if self._earlier and step is not None:
            kept = [row for row in self._earlier if int(row["step"]) < step]
            self.experiment.metrics = [{k: v for k, v in row.items() if v != ""} for row in kept]
            self._earlier = []
        super().log_metrics(metrics, step)
