"""Held-out steps of a dataset in place of a simulator: cheap, and it runs anywhere."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol

from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Step


class HeldOut(Protocol):
    """What this needs of a DataModule."""

    mix: Mapping[str, float]

    @property
    def statistics(self) -> Mapping[str, DatasetStatistics]:
        """Each dataset's statistics, the ones its steps were normalised with."""

    def check(self) -> None:
        """Find out quickly whether the datasets are there."""

    def prepare_data(self) -> None:
        """Index the datasets, unless that was done before."""

    def setup(self, stage: str) -> None:
        """Open the datasets."""

    def val_dataloader(self) -> Iterable[list[Step]]:
        """Batches of the held-out split, as `collate` made them."""


class Offline:
    """Predict the actions of held-out demonstrations.

    Token accuracy is the paper's measure of when to stop training (section 3.4: above 95 %), but a policy with a good
    one may still fail closed-loop: success rates need a simulator or a robot.

    Args:
        data: builds a `VLADataModule` when called with `collate`, `image_size` and `normalisation`.
        dataset: which dataset of the mixture; None when there is one.
        num_steps: how many held-out steps to look at; fewer when the split is smaller.
    """

    def __init__(self, data: Callable[..., HeldOut], dataset: str | None = None, num_steps: int = 1000) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.build, self.dataset, self.num_steps = data, dataset, num_steps

    def check(self) -> None:
        """Find out, before a model is loaded, whether its predictions could be compared with anything.

        Raises:
            FileNotFoundError: when the data is not there.
            ValueError: when `dataset` is unknown, or absent where there are several.
        """
        data = self.build(collate=list, image_size=1, normalisation="quantile")  # neither matters yet
        self._name(data)
        data.check()

    def open(self, image_size: int, normalisation: str) -> tuple[Iterator[list[Step]], DatasetStatistics]:
        """Open the held-out split for a policy.

        Args:
            image_size, normalisation: those the policy was trained with.

        Returns:
            Lists of steps, `num_steps` in all, and the statistics that normalised their actions.
        """
        data = self.build(collate=list, image_size=image_size, normalisation=normalisation)
        name = self._name(data)
        data.prepare_data()
        data.setup("validate")
        return self._batches(data, name), data.statistics[name]

    def _name(self, data: HeldOut) -> str:
        known = list(data.mix)
        if self.dataset in known:
            return str(self.dataset)
        if self.dataset is None and len(known) == 1:
            return known[0]
        problem = f"dataset {self.dataset!r} is not held out here" if self.dataset else "choose a dataset"
        raise ValueError(f"{problem}: env.dataset=... takes one of {', '.join(known)}")

    def _batches(self, data: HeldOut, name: str) -> Iterator[list[Step]]:
        left = self.num_steps
        for batch in data.val_dataloader():
            if steps := list(islice((step for step in batch if step.dataset_name == name), left)):
                yield steps
            left -= len(steps)
            if left <= 0:
                return
