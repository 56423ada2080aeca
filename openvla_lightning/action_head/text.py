"""Words instead of actions: the head of the VLM stage."""

from collections.abc import Sequence

from torch import Tensor

from openvla_lightning.action_head.metrics import TokenMetrics
from openvla_lightning.action_head.tokens import TokenHead
from openvla_lightning.types import IGNORE_INDEX, Batch, VLAOutput


class TextHead(TokenHead):
    """No actions yet: the answers of conversations, learnt by next-token prediction (the VLM stage)."""

    def score(self, output: VLAOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which learnt tokens were predicted exactly, and which tokens are learnt: bool [B, L - 1] or [B, K] both."""
        targets = output.targets(batch.labels)
        return output.next_token_logits.argmax(-1) == targets, targets != IGNORE_INDEX

    def metrics(self, datasets: Sequence[str]) -> TokenMetrics:  # type: ignore[override]
        """Accuracy over tokens."""
        return TokenMetrics()
