"""A logger of the lab's own: one line of text for each row of metrics."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class Lines(Logger):
    """Appends metrics to `lines.txt`.

    Args:
        save_dir: folder of the run.
    """

    name, version = "lines", ""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "lines.txt"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{step} " + " ".join(f"{name}={value:.4g}" for name, value in metrics.items()) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config lies beside."""
