"""The DataModule of VLM training: it serves conversations as batches."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from openvla_lightning.data.loader import ResumableDataModule, SampleError
from openvla_lightning.data.permutation import Ints, key, permute
from openvla_lightning.data.preflight import MissingDataError, data_errors
from openvla_lightning.data.source.conversations import Captions, Conversations, ConversationSource
from openvla_lightning.types import Conversation

log = logging.getLogger(__name__)


class ConversationOrder:
    """Maps sample numbers to conversations; the result depends only on the seed and the number.

    All conversations of a batch have an image, or none has. In every epoch, each conversation comes once, in a new
    random order. If the last batch of a kind is not full, the kind's first conversations complete it.

    Args:
        groups: the places of the conversations of each kind.
        batch_size: samples in a batch.
        seed: seed of the order.
    """

    def __init__(self, groups: Sequence[Ints], batch_size: int, seed: int) -> None:
        self.groups, self.batch_size, self.seed = [group for group in groups if len(group)], batch_size, seed
        self.ends = np.cumsum([-(-len(group) // batch_size) for group in self.groups])

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return int(self.ends[-1]) * self.batch_size

    def __call__(self, numbers: Ints) -> Ints:
        """The places of the conversations of samples `numbers` [n], int64 [n]."""
        numbers = np.asarray(numbers, np.int64)
        places = np.empty_like(numbers)
        epochs = numbers // self.samples
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            batch, row = np.divmod(numbers[here] % self.samples, self.batch_size)
            batch = permute(batch, int(self.ends[-1]), key(self.seed, 11, epoch))
            group_numbers = np.searchsorted(self.ends, batch, side="right")
            first = np.concatenate([[0], self.ends[:-1]])[group_numbers]
            for i, group in enumerate(self.groups):
                in_group = group_numbers == i
                within = ((batch - first)[in_group] * self.batch_size + row[in_group]) % len(group)
                places[here[in_group]] = group[permute(within, len(group), key(self.seed, 12, epoch, i))]
        return places


class ConversationBatches:
    """Maps lists of sample numbers to lists of `Conversation`s; a torch DataLoader reads from it."""

    def __init__(self, source: ConversationSource, order: ConversationOrder) -> None:
        self.source, self.order = source, order

    def __getitem__(self, numbers: Sequence[int]) -> list[Conversation]:
        places = self.order(np.asarray(numbers, np.int64)).tolist()
        return [self._read(place, number) for place, number in zip(places, numbers, strict=True)]

    def where(self, number: int) -> str:
        """The place of a sample, in words."""
        return f"{self.source.name}, entry {int(self.order(np.array([number]))[0])}"

    def _read(self, place: int, number: int) -> Conversation:
        try:
            return self.source.read(place, number)
        except (ValueError, OSError) as error:
            raise SampleError(f"{self.source.name}, entry {place}: {error}") from error


class ConversationDataModule(ResumableDataModule):
    """Serves conversations with or without images as batches.

    The order is a function of the seed and the number of the sample, and a checkpoint resumes at the very next sample.

    Args:
        source: builds the dataset when called with `name`; a robot dataset is turned into questions about its pictures.
        name: name of the conversations or of the robot dataset.
        collate: list of `Conversation`s -> batch; `ChatProcessor.collate`.
        image_size: size of robot pictures in pixels; all others keep their size until they are collated.
        global_batch_size: samples in one optimiser step, over all devices and accumulated batches.
        val_fraction: share of the conversations to hold out.
        seed: seed of the order and the split.
        num_workers: loader processes per device; None: by the number of cores.

    Raises:
        ValueError: an argument is not valid.
    """

    def __init__(
        self,
        source: Callable[..., Any],
        collate: Callable[[list[Conversation]], Any],
        image_size: int,
        global_batch_size: int,
        name: str = "conversations",
        val_fraction: float = 0.01,
        seed: int = 7,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(collate, global_batch_size, num_workers)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: a share of the conversations, 0 <= val_fraction < 1")
        dataset = source(name=name)
        self.source: ConversationSource = (
            dataset if isinstance(dataset, Conversations) else Captions(dataset, image_size)
        )
        self.val_fraction, self.seed = val_fraction, seed

    def missing(self) -> list[str]:
        """The name of the dataset if it is not on disk."""
        return [self.source.name] if self.source.missing() else []

    def check(self) -> None:
        """Raise MissingDataError when the dataset is not there."""
        if problem := self.source.missing():
            raise MissingDataError(problem)

    @data_errors()
    def prepare_data(self) -> None:
        """Index the dataset if it needs an index."""
        self.check()
        self.source.prepare()

    @data_errors()
    def setup(self, stage: str | None = None) -> None:
        """Hold out a random share of the conversations, with and without an image alike."""
        with_image = self.source.with_image
        held_out = np.zeros(len(with_image), bool)
        shuffled = permute(np.arange(len(with_image)), len(with_image), key(self.seed, 13))
        held_out[shuffled[: int(self.val_fraction * len(with_image))]] = True
        self.train = [np.flatnonzero(~held_out & kind) for kind in (with_image, ~with_image)]
        self.val = [np.flatnonzero(held_out & kind) for kind in (with_image, ~with_image)]
        if not sum(map(len, self.train)):
            raise ValueError(f"{self.source.name}: no conversation is left to train on")
        log.info(
            f"{self.source.name}: {len(self.train[0]):,} conversations with an image, {len(self.train[1]):,} without"
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches, starting at the sample where the last checkpoint stopped."""
        self.order = ConversationOrder(self.train, self.batch_size, self.seed)
        return self.training_loader(ConversationBatches(self.source, self.order), self.order.samples)

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out conversations, each once, in one fixed order; only those with an image, if there are any."""
        order = ConversationOrder([next((kind for kind in self.val if len(kind)), self.train[0])], 1, self.seed)
        return self.held_out_loader(ConversationBatches(self.source, order), len(order.groups[0]))

    def where(self, number: int) -> str:
        """The place of a training sample, in words."""
        return f"entry {int(self.order(np.array([number]))[0])}"

    def served(self) -> dict[str, tuple[int, float]]:
        """How many conversations were served to training, and how many were intended."""
        return {self.source.name: (self.samples_served, self.samples_served)}

    def state_dict(self) -> dict[str, Any]:
        """The next sample's number."""
        return {"samples_served": self.samples_served, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the sample of `state_dict`."""
        self.samples_served = state_dict["samples_served"]
        if state_dict["seed"] != self.seed:
            log.warning("data.seed changed since the checkpoint: the order is another one now")
