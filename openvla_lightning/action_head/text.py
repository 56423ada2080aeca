"""The head of VLM training, which predicts text instead of actions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from openvla_lightning.action_head.tokens import TokenHead
from openvla_lightning.types import IGNORE_INDEX, Batch, Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric


class TextHead(TokenHead):
    """Learns the answers of conversations by next-token prediction, without actions (VLM training)."""

    def prediction(self, logits: Tensor, batch: Batch) -> Prediction:
        """Which learnt tokens were predicted exactly, and which tokens count; the actions are empty."""
        targets = batch.labels[:, 1:].gather(1, batch.places)
        return Prediction(
            actions=batch.actions,
            targets=batch.actions,
            correct=logits.argmax(-1) == targets,
            logits=logits.detach(),
            counted=targets != IGNORE_INDEX,
        )

    def metrics(self, datasets: Sequence[str]) -> "Metric":
        """Accuracy over tokens."""
        from openvla_lightning.action_head.metrics import TokenMetrics  # torchmetrics takes a second

        return TokenMetrics()
