"""Optimiser and learning-rate schedule, as one object that Lightning can ask for both."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "linear", "cosine")


class AdamW:
    """AdamW with the paper's schedule: a constant rate, no warm-up, no weight decay (section 3.4).

    Args:
        lr: peak learning rate.
        weight_decay: on every matrix; biases, norms and other vectors never decay.
        betas: AdamW's.
        schedule: after warm-up `constant`, or `linear` / `cosine` down to `final_ratio * lr` at the last step.
        warmup_ratio: share of all steps over which the rate rises linearly from zero.
        final_ratio: of `lr`, where a decaying schedule ends.
    """

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        schedule: str = "constant",
        warmup_ratio: float = 0.0,
        final_ratio: float = 0.0,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: choose {', '.join(SCHEDULES)}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.lr, self.weight_decay, self.betas = lr, weight_decay, (betas[0], betas[1])
        self.schedule, self.warmup_ratio, self.final_ratio = schedule, warmup_ratio, final_ratio

    def factor(self, step: int, total_steps: float) -> float:
        """What `lr` is multiplied by at optimiser step `step` of `total_steps`."""
        warmup = round(self.warmup_ratio * total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        falling = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_ratio + (1 - self.final_ratio) * falling

    def build(
        self, parameters: Iterable[torch.nn.Parameter], total_steps: float
    ) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        """What `LightningModule.configure_optimizers` returns.

        Raises:
            ValueError: when no parameter learns, or a decaying schedule has no last step.
        """
        learning = [p for p in parameters if p.requires_grad]
        if not learning:
            raise ValueError("no parameter requires a gradient: the strategy froze the whole model")
        if not 0 < total_steps < math.inf and (self.schedule != "constant" or self.warmup_ratio):
            raise ValueError(f"schedule={self.schedule} needs an end: set trainer.max_steps")
        groups = [
            {"params": [p for p in learning if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas)
        scheduler = LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
