"""Accuracy of choices and L1 of actions, overall and per dataset, without a device synchronisation per step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from openvla_lightning.types import Batch, Prediction


class ActionMetrics(Metric):
    """Means over choices (action tokens) and numbers since the last `reset`.

    Args:
        datasets: every dataset name that may occur, so that all ranks agree on the state's shape.
    """

    full_state_update = False
    totals: Tensor

    def __init__(self, datasets: Sequence[str]) -> None:
        super().__init__()
        self.datasets = list(datasets)
        zeros = torch.zeros(len(self.datasets), 4, dtype=torch.float32)
        self.add_state("totals", default=zeros, dist_reduce_fx="sum")

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Add the prediction for a batch, without choices that do not count and without padded actions."""
        rows = torch.tensor([self.datasets.index(name) for name in batch.dataset_names])
        rows = rows.to(self.totals.device, non_blocking=True)
        error = prediction.error
        numbers = torch.full_like(error, 1.0)
        if batch.padded is not None:
            numbers = numbers.masked_fill(batch.padded.repeat_interleave(batch.actions.shape[2], dim=1), 0.0)
            error = error * numbers
        correct = choices = torch.zeros_like(error[:, :0])
        if prediction.correct is not None:
            correct = prediction.correct.to(error.dtype)
            choices = torch.full_like(correct, 1.0)
            if prediction.counted is not None:
                choices = prediction.counted.to(error.dtype)
                correct = correct * choices
        per_sample = torch.stack([values.sum(-1) for values in (correct, choices, error, numbers)], dim=-1)
        self.totals.index_add_(0, rows, per_sample.to(self.totals))

    def compute(self) -> dict[str, Tensor]:
        """Return `action_accuracy` (for heads with choices) and `l1`, overall and as `<metric>/<dataset>`."""
        values: dict[str, Tensor] = {}
        total = self.totals.sum(0)
        for suffix, (correct, choices, error, numbers) in [
            ("", total),
            *zip(self._suffixes(), self.totals, strict=True),
        ]:
            if choices > 0:
                values[f"action_accuracy{suffix}"] = correct / choices
            if numbers > 0:
                values[f"l1{suffix}"] = error / numbers
        return values

    def _suffixes(self) -> list[str]:
        return [f"/{name}" for name in self.datasets]


class TokenMetrics(Metric):
    """Mean over the learnt tokens of conversations since the last `reset`."""

    full_state_update = False
    totals: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", default=torch.zeros(2), dist_reduce_fx="sum")

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Add which of a batch's learnt tokens were predicted exactly."""
        assert prediction.correct is not None
        assert prediction.counted is not None
        correct, learnt = prediction.correct, prediction.counted
        self.totals += torch.stack([(correct & learnt).sum(), learnt.sum()]).to(self.totals)

    def compute(self) -> dict[str, Tensor]:
        """Return `token_accuracy`."""
        correct, count = self.totals
        return {"token_accuracy": correct / count} if count > 0 else {}
