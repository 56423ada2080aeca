"""Action-token accuracy and L1, overall and per dataset, without a device synchronisation per step."""

from collections.abc import Sequence

import torch
from torchmetrics import Metric


class ActionMetrics(Metric):
    """Means over action tokens since the last `reset`.

    Args:
        datasets: every dataset name that may occur, so that all ranks agree on the state's shape.
    """

    full_state_update = False
    totals: torch.Tensor

    def __init__(self, datasets: Sequence[str]) -> None:
        super().__init__()
        self.datasets = list(datasets)
        zeros = torch.zeros(len(self.datasets), 3, dtype=torch.float32)
        self.add_state("totals", default=zeros, dist_reduce_fx="sum")

    def update(self, correct: torch.Tensor, error: torch.Tensor, datasets: Sequence[str]) -> None:
        """Add a batch.

        Args:
            correct: bool [B, N], was each action token predicted exactly.
            error: float [B, N], absolute difference of predicted and true bin centre, in normalised units.
            datasets: B dataset names.
        """
        rows = torch.tensor([self.datasets.index(name) for name in datasets])
        rows = rows.to(self.totals.device, non_blocking=True)
        count = torch.full_like(error, 1.0).sum(-1)
        per_sample = torch.stack([correct.to(error.dtype).sum(-1), error.sum(-1), count], dim=-1)
        self.totals.index_add_(0, rows, per_sample.to(self.totals))

    def compute(self) -> dict[str, torch.Tensor]:
        """Return `action_accuracy` and `l1`, and each again as `<metric>/<dataset>` for datasets that occurred."""
        values: dict[str, torch.Tensor] = {}
        total = self.totals.sum(0)
        for suffix, (correct, error, count) in [("", total), *zip(self._suffixes(), self.totals, strict=True)]:
            if count > 0:
                values[f"action_accuracy{suffix}"] = correct / count
                values[f"l1{suffix}"] = error / count
        return values

    def _suffixes(self) -> list[str]:
        return [f"/{name}" for name in self.datasets]


class TokenMetrics(Metric):
    """Mean over the learnt tokens of conversations since the last `reset`."""

    full_state_update = False
    totals: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", default=torch.zeros(2), dist_reduce_fx="sum")

    def update(self, correct: torch.Tensor, learnt: torch.Tensor, datasets: Sequence[str]) -> None:
        """Add a batch: bool [B, N] of predictions, and of which of them count."""
        self.totals += torch.stack([(correct & learnt).sum(), learnt.sum()]).to(self.totals)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return `token_accuracy`."""
        correct, count = self.totals
        return {"token_accuracy": correct / count} if count > 0 else {}
