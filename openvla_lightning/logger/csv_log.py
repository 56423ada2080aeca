"""The CSV log that every run writes."""

import csv
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from openvla_lightning.report.training_log import read_log
from openvla_lightning.runtime.files import written_whole

log = logging.getLogger(__name__)


class CSVLogger(LightningCSVLogger):
    """Lightning's CSVLogger, but a resumed run continues its log instead of deleting it.

    Rows of an earlier attempt in the same folder are kept up to the first step that is logged again; if nothing is left
    to train, all of them are kept.

    Args:
        save_dir: the run's folder; the log is `<save_dir>/metrics.csv`.
        flush_logs_every_n_steps: largest number of rows that a kill loses.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 1) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._experiment = _Writer(self.log_dir)


class _Writer(ExperimentWriter):
    """Appends rows; if the columns change, rewrites the whole file atomically."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path, self.waiting = Path(self.metrics_file_path), False
        self.whole: int | None = None
        """Rows of the file that this attempt kept or wrote; None: it has not written yet."""

    def _check_log_dir_exists(self) -> None:
        """Do nothing; Lightning deletes the log of an earlier attempt here."""

    def save(self) -> None:
        """Write the rows that are new; where the disk does not take them they wait, for training matters more."""
        if not self.metrics:
            return
        columns = sorted({*self.metrics_keys, *(key for row in self.metrics for key in row)})
        try:
            if columns == self.metrics_keys:
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, columns).writerows(self.metrics)
                self.whole = (self.whole or 0) + len(self.metrics)
            else:
                self._rewrite(columns)
        except OSError as error:
            if not self.waiting:
                log.warning(f"{self.path} cannot be written ({error.strerror}): its rows wait until it can")
            self.waiting, self.metrics_keys = True, []  # half a row may be there: next time all is written anew
            return
        self.metrics, self.waiting = [], False

    def _rewrite(self, columns: list[str]) -> None:
        """Write the existing rows, after a resume only up to the first new step, and then the new ones."""
        rows: list[dict[str, Any]] = [*read_log(self.path)][: self.whole]
        if self.whole is None:  # all of them are of earlier attempts
            rows = [row for row in rows if int(row["step"]) < self.metrics[0]["step"]]
        columns = sorted({*columns, *(key for row in rows for key in row)})
        with written_whole(self.path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows([*rows, *self.metrics])
        self.metrics_keys, self.whole = columns, len(rows) + len(self.metrics)
