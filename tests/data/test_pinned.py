"""Batches go to a device from pinned memory, without anybody waiting."""

from typing import Any

import pytest
import torch

from openvla_lightning.module import VLAModule
from openvla_lightning.types import Batch


def batch(words: Batch | None = None) -> Batch:
    ids = torch.zeros(2, 3, dtype=torch.long)
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    given = {"input_ids": ids, "attention_mask": ids.bool(), "places": ids[:, :1], "labels": ids}
    return Batch(pixel_values=pixels, actions=torch.zeros(2, 1, 7), numbers=[3, 4], words=words, **given)


def test_every_tensor_is_pinned_those_of_the_words_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)  # type: ignore[func-returns-value]
    given = batch(words=batch())
    same = given.pin_memory()
    assert len(pinned) == 2 * 6
    assert same.numbers == given.numbers
    assert same.words is not None


def test_a_batch_is_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs.get("non_blocking"))
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    VLAModule.transfer_batch_to_device(None, batch(words=batch()), torch.device("meta"), 0)  # type: ignore[arg-type]
    assert asked == [True] * 12
