"""Held-out steps of a dataset in place of a simulator: cheap, and it runs anywhere."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from openvla_lightning.types import Step


class HeldOut(Protocol):
    """What this needs of a DataModule."""

    statistics: dict[str, Any]
    """Each dataset's `DatasetStatistics`, the ones its steps were normalised with."""
    normalisation: str

    def setup(self, stage: str) -> None:
        """Open the datasets."""

    def val_dataloader(self) -> Iterable[list[Step]]:
        """Batches of the held-out split, as `collate` made them."""


class Offline:
    """Predict the actions of held-out demonstrations.

    Token accuracy is the paper's measure of when to stop training (section 3.4: above 95 %), but a policy with a good
    one may still fail closed-loop: success rates need a simulator or a robot.

    Args:
        data: builds a `VLADataModule` when called with `collate`.
        dataset: which dataset of the mixture; None when there is one.
        num_steps: how many held-out steps to look at; fewer when the split is smaller.
    """

    def __init__(self, data: Callable[..., HeldOut], dataset: str | None = None, num_steps: int = 1000) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.build, self.dataset, self.num_steps = data, dataset, num_steps

    def open(self) -> None:
        """Open the held-out split; the first call does the work.

        Raises:
            ValueError: when `dataset` is unknown, or absent where there are several.
        """
        if hasattr(self, "data"):
            return
        data = self.build(collate=list)
        data.setup("validate")
        names = list(data.statistics)
        if self.dataset not in names and (self.dataset or len(names) > 1):
            problem = f"dataset {self.dataset!r} is not held out here" if self.dataset else "choose a dataset"
            raise ValueError(f"{problem}: env.dataset=... takes one of {', '.join(names)}")
        self.data, self.dataset = data, self.dataset or names[0]

    def statistics(self) -> Any:
        """The `DatasetStatistics` that normalised the steps."""
        self.open()
        return self.data.statistics[str(self.dataset)]

    def batches(self) -> Iterator[list[Step]]:
        """Lists of held-out steps of the dataset, `num_steps` in all."""
        self.open()
        left = self.num_steps
        for batch in self.data.val_dataloader():
            steps = list(islice((step for step in batch if step.dataset_name == self.dataset), left))
            if steps:
                yield steps
            left -= len(steps)
            if left <= 0:
                return
