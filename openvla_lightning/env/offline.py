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

    def train_dataloader(self) -> Iterable[list[Step]]:
        """Batches of the mixture."""


class Offline:
    """Predict the actions of held-out demonstrations.

    Token accuracy is the paper's measure of when to stop training (section 3.4: above 95 %), but a policy with a good
    one may still fail closed-loop: success rates need a simulator or a robot.

    Args:
        data: builds a `VLADataModule` when called with `collate`, `image_size` and `normalisation`.
        dataset: which dataset of the mixture; None: each of them.
        num_steps: how many held-out steps of each dataset to look at; fewer when the split is smaller.
    """

    stage = "validate"

    def __init__(self, data: Callable[..., HeldOut], dataset: str | None = None, num_steps: int = 1000) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.build, self.dataset, self.num_steps = data, dataset, num_steps

    def check(self) -> None:
        """Find out, before a model is loaded, whether its predictions could be compared with anything.

        Raises:
            FileNotFoundError: when the data is not there.
            ValueError: when `dataset` is unknown.
        """
        data = self.build(collate=list, image_size=1, normalisation="quantile")  # neither matters yet
        self._names(data)
        data.check()

    def open(
        self, image_size: int, normalisation: str
    ) -> tuple[Iterator[list[Step]], Mapping[str, DatasetStatistics], list[str]]:
        """Open the held-out split for a policy.

        Args:
            image_size, normalisation: those the policy was trained with.

        Returns:
            Lists of steps, each of one dataset and `num_steps` of it in all; the statistics that normalised their
            actions, by dataset; the datasets' names.
        """
        data = self.build(collate=list, image_size=image_size, normalisation=normalisation)
        names = self._names(data)
        data.prepare_data()
        data.setup(self.stage)
        return self._batches(data, names), data.statistics, names

    def _loader(self, data: HeldOut) -> Iterable[list[Step]]:
        return data.val_dataloader()

    def _names(self, data: HeldOut) -> list[str]:
        known = list(data.mix)
        if self.dataset is None:
            return known
        if self.dataset not in known:
            raise ValueError(
                f"dataset {self.dataset!r} is not held out here: env.dataset=... takes one of {', '.join(known)}"
            )
        return [self.dataset]

    def _batches(self, data: HeldOut, names: list[str]) -> Iterator[list[Step]]:
        left = dict.fromkeys(names, self.num_steps)
        for batch in self._loader(data):
            for name in names:
                if steps := list(islice((step for step in batch if step.dataset_name == name), left[name])):
                    yield steps
                left[name] -= len(steps)
            if not any(left.values()):
                return


class TrainingSteps(Offline):
    """The same with steps that were trained on: see `openvla_lightning.evaluation.open_loop`. Arguments as above."""

    stage = "fit"

    def _loader(self, data: HeldOut) -> Iterable[list[Step]]:
        return data.train_dataloader()
