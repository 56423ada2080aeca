"""What training, the processor and the policy ask of an action head."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from openvla_lightning.action_head.metrics import ActionMetrics
from openvla_lightning.types import Batch, VLAOutput


class ActionHead(Protocol):
    """What training, the processor and the policy ask of a head."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    def encode(self, actions: Tensor) -> Tensor:
        """Target ids [B, T * D] of normalised actions [B, T, D]."""

    def loss(self, output: VLAOutput, batch: Batch) -> Tensor:
        """Scalar to minimise."""

    def score(self, output: VLAOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Correctness and absolute error of each action token, bool and float [B, T * D]."""

    def metrics(self, datasets: Sequence[str]) -> ActionMetrics:
        """Collects scores of samples from these datasets."""

    def entropy(self, output: VLAOutput, batch: Batch) -> Tensor:
        """How undecided each action token's prediction is, float [B, T * D]."""

    def decode(self, ids: Tensor) -> Tensor:
        """Normalised action values, float64 in the shape of `ids`."""
