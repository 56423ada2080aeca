"""Conversations beside robot steps, so that a model that learns to act does not forget language."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from openvla_lightning.data.loader import SampleError
from openvla_lightning.data.permutation import key, permute, uniform
from openvla_lightning.data.preflight import MissingDataError
from openvla_lightning.data.source.conversations import Captions, Conversations, ConversationSource
from openvla_lightning.types import Batch, Conversation, Step


def beside(conversations: Mapping[str, Any] | None, image_size: int, seed: int, proprio: bool) -> "list[CoTraining]":
    """The `CoTraining` that `data.conversations` describes, as a list; empty for None.

    Raises:
        ValueError: for a model that reads proprioception, because conversations have none.
    """
    if conversations is None:
        return []
    if proprio:
        raise ValueError("data.conversations: a model that is told its proprioception cannot be shown conversations")
    return [CoTraining(**conversations, image_size=image_size, seed=seed)]


class CoTraining:
    """Chooses the conversations that are learnt beside given steps, as a function of the seed and the steps' numbers.

    So resuming needs no state, and processes need not communicate. All conversations of a batch have an image, or none
    has, alike on all processes: a sharded model gathers its vision backbone together or not at all.

    Args:
        source: builds the dataset when called with `name`; a robot dataset is turned into questions about its pictures.
        share: conversations per step; each batch has at least one.
        name: name of the conversations or of the robot dataset.
        image_size: size of robot pictures in pixels.
        seed: seed of the order.

    Attributes:
        rank: number of this process, which is how far its first step is from the batch's.

    Raises:
        ValueError: for a share that is not above 0.
    """

    rank = 0

    def __init__(
        self,
        source: Callable[..., Any],
        share: float,
        name: str = "conversations",
        image_size: int = 224,
        seed: int = 7,
    ) -> None:
        if share <= 0:
            raise ValueError(f"data.conversations.share={share}: above 0; data.conversations=null trains without words")
        dataset = source(name=name)
        self.source: ConversationSource = (
            dataset if isinstance(dataset, Conversations) else Captions(dataset, image_size)
        )
        self.share, self.seed = share, seed

    def check(self) -> None:
        """Check in milliseconds whether the conversations are there.

        Raises:
            MissingDataError: when they are not.
        """
        if problem := self.source.missing():
            raise MissingDataError(problem)

    def beside(self, numbers: Sequence[int]) -> list[Conversation]:
        """The conversations that are learnt beside the steps with these numbers.

        Raises:
            SampleError: a conversation cannot be read; the message says where it is.
        """
        with_image = self.source.with_image
        kinds = [np.flatnonzero(with_image), np.flatnonzero(~with_image)]
        first = np.array([numbers[0] - self.rank], np.uint64)
        group = kinds[int(uniform(first ^ key(self.seed, 21))[0] >= len(kinds[0]) / len(with_image))]
        count = max(1, round(self.share * len(numbers)))
        sample_numbers = np.array(
            [numbers[place % len(numbers)] + place // len(numbers) for place in range(count)], np.int64
        )
        epochs, within = np.divmod(sample_numbers, len(group))
        seeds = np.array([key(self.seed, 22, epoch) for epoch in epochs.tolist()], np.uint64)
        places = group[permute(within, len(group), seeds)].tolist()
        return [self._read(place, number) for place, number in zip(places, sample_numbers.tolist(), strict=True)]

    def _read(self, place: int, number: int) -> Conversation:
        try:
            return self.source.read(place, number)
        except (ValueError, OSError) as error:
            raise SampleError(f"{self.source.name}, entry {place}: {error}") from error


class WithWords:
    """Collates steps, and adds their conversations as `Batch.words`.

    Args:
        collate: steps -> batch (`Processor.collate`).
        chat: conversations -> batch (`ChatProcessor.collate`).
        cotraining: chooses the conversations.
    """

    def __init__(
        self,
        collate: Callable[[list[Step]], Batch],
        chat: Callable[[list[Conversation]], Batch],
        cotraining: CoTraining,
    ) -> None:
        self.collate, self.chat, self.cotraining = collate, chat, cotraining

    def __call__(self, steps: list[Step]) -> Batch:
        """A batch of steps with its conversations."""
        return replace(self.collate(steps), words=self.chat(self.cotraining.beside([step.number for step in steps])))
