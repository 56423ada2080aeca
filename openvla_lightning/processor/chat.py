"""Conversations -> tensors: the processor of VLM training."""

from collections.abc import Sequence

import torch

from openvla_lightning.processor.prompt import build_turn
from openvla_lightning.processor.robot import Processor
from openvla_lightning.types import IGNORE_INDEX, Batch, Conversation, learnt_places


class ChatProcessor(Processor):
    """Makes batches of conversations, as in the training of Prismatic VLMs; all else is inherited."""

    def collate(self, conversations: Sequence[Conversation]) -> Batch:  # type: ignore[override]
        """Make a training batch; answers and their end tokens are learnt, questions are not.

        Texts longer than `max_length` are cut, as released.

        Raises:
            ValueError: when only some conversations have an image.
        """
        rows = [self._row(conversation.turns) for conversation in conversations]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, (ids, learnt) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(learnt)
        images = [conversation.image for conversation in conversations if conversation.image is not None]
        if images and len(images) < len(rows):
            raise ValueError("conversations with images and without cannot share a batch")
        return Batch(
            pixel_values=self.transform.pixels(images)
            if images
            else torch.zeros(0, 3, *2 * (self.transform.image_size,), dtype=torch.uint8),
            input_ids=input_ids,
            attention_mask=torch.arange(width) < torch.tensor([len(ids) for ids, _ in rows])[:, None],
            labels=labels,
            places=learnt_places(labels),
            actions=torch.zeros(len(rows), 0, 0),
            dataset_names=[conversation.dataset_name for conversation in conversations],
            numbers=[conversation.number for conversation in conversations],
        )

    def _row(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids and labels. Questions and answers are tokenised separately, as released."""
        ids, labels = [self._bos()], [IGNORE_INDEX]
        for place, (question, answer) in enumerate(turns):
            question_ids = self._text(build_turn(question, self.prompt, first=place == 0))
            answer_ids = [*self._text(answer or " "), self.eos_token_id]
            ids += question_ids + answer_ids
            labels += [IGNORE_INDEX] * len(question_ids) + answer_ids
        return ids[: self.max_length], labels[: self.max_length]
