"""A head of the lab's own: tokens, learnt with smoothed labels."""

from typing import Any

import torch
from torch import Tensor

from openvla_lightning.action_head import TokenHead
from openvla_lightning.types import IGNORE_INDEX


class SmoothHead(TokenHead):
    """`TokenHead` whose targets share some of their weight with all other ids.

    Args:
        smoothing: the share, 0 to 1.
        arguments: those of `TokenHead`.
    """

    def __init__(self, smoothing: float = 0.1, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.smoothing = smoothing

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {**super().config, "smoothing": self.smoothing}

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Smoothed mean cross-entropy."""
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, label_smoothing=self.smoothing
        )
