"""Optimiser and learning-rate schedule in one object."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "linear", "cosine", "step")
STATE_BYTES = {"adamw": 8.0, "adamw_bf16": 4.0, "adamw_8bit": 2.03}
"""Kinds of AdamW -> bytes of state per parameter: two moments of 32, 16 or 8 bits."""


class AdamW:
    """AdamW with the paper's schedule: a constant rate, no warm-up, no weight decay (section 3.4).

    Args:
        lr: peak learning rate.
        weight_decay: applied to every matrix; biases, norms and other vectors never decay.
        betas: AdamW's decay rates of the moments.
        schedule: after warm-up, the rate is `constant`; or it falls as `linear` or `cosine` to `final_ratio * lr` at
            the last step; or with `step` it drops to `final_ratio * lr` at optimiser step `drop_at`.
        warmup_ratio: share of all steps over which the rate rises linearly from zero.
        final_ratio: final rate of a decaying schedule, as a share of `lr`.
        drop_at: for `schedule=step`, the optimiser step at which the lower rate begins.
        kind: `adamw`; `adamw_bf16` or `adamw_8bit` (bitsandbytes) store the moments in 16 or 8 bits. They need 4 or 6
            bytes less per trainable parameter, which helps large models that learn in full. FSDP cannot shard
            `adamw_8bit`.

    Raises:
        ValueError: for an unknown schedule or kind, or a number out of its range.
    """

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        schedule: str = "constant",
        warmup_ratio: float = 0.0,
        final_ratio: float = 0.0,
        kind: str = "adamw",
        drop_at: int | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: choose {', '.join(SCHEDULES)}")
        if (schedule == "step") != (drop_at is not None):
            raise ValueError(f"schedule={schedule} with drop_at={drop_at}: step needs drop_at, others take none")
        if kind not in STATE_BYTES:
            raise ValueError(f"unknown optimiser {kind!r}: choose {', '.join(STATE_BYTES)}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive, got {lr}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are two numbers of at least 0 and below 1, got {list(betas)}")
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is a share of all steps, from 0 to 1, got {warmup_ratio}")
        self.lr, self.weight_decay, self.betas = lr, weight_decay, (betas[0], betas[1])
        self.drop_at = drop_at
        self.schedule, self.warmup_ratio, self.final_ratio, self.kind = schedule, warmup_ratio, final_ratio, kind

    def factor(self, step: int, total_steps: float) -> float:
        """The factor of `lr` at optimiser step `step` of `total_steps`."""
        warmup = round(self.warmup_ratio * total_steps) if self.warmup_ratio else 0  # a run may have no end
        if step < warmup:
            return (step + 1) / warmup
        if self.drop_at is not None:
            return self.final_ratio if step >= self.drop_at else 1.0
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        falling = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_ratio + (1 - self.final_ratio) * falling

    def build(
        self, parameters: Iterable[torch.nn.Parameter], total_steps: float, fused: bool = False
    ) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        """The return value of `LightningModule.configure_optimizers`.

        Args:
            parameters: all parameters of the model, frozen ones included.
            total_steps: optimiser steps.
            fused: use one kernel instead of many passes over memory; results differ in the last bits. For
                `kind="adamw"`.

        Raises:
            ValueError: when no parameter learns, or a decaying schedule has no last step.
        """
        learning = [p for p in parameters if p.requires_grad]
        if not learning:
            raise ValueError("no parameter requires a gradient: the strategy froze the whole model")
        if not 0 < total_steps < math.inf and (self.schedule not in ("constant", "step") or self.warmup_ratio):
            raise ValueError(f"schedule={self.schedule} needs an end: set trainer.max_steps")
        parts = [p for p in learning if p.ndim >= 2], [p for p in learning if p.ndim < 2]
        groups = [{"params": part, "weight_decay": self._decay(part)} for part in parts if part]
        optimizer = _optimizer(self.kind, fused)(groups, lr=self.lr, betas=self.betas)
        scheduler = LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def take_over(self, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
        """Set this rate, decay and betas, because a loaded checkpoint brings back those of the run's earlier part."""
        for group in optimizer.param_groups:
            rate = group["lr"] * (self.lr / group["initial_lr"])  # the same to the bit if the command says the same
            decay = self._decay(group["params"])
            group.update(lr=rate, initial_lr=self.lr, betas=self.betas, weight_decay=decay)
        scheduler.base_lrs = [self.lr] * len(optimizer.param_groups)

    def _decay(self, group: list[torch.nn.Parameter]) -> float:
        return self.weight_decay if group[0].ndim >= 2 else 0.0


def _optimizer(kind: str, fused: bool) -> Callable[..., torch.optim.Optimizer]:
    if kind == "adamw_8bit":
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit
    if kind == "adamw_bf16":
        return BFloat16AdamW
    return lambda groups, **options: torch.optim.AdamW(groups, fused=fused, **options)


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW that stores its moments in bfloat16 and computes in float32.

    Moments are rounded stochastically. With rounding to the nearest, a second moment with beta 0.999 would never
    fall, because its changes are smaller than the spacing of bfloat16.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as torch's AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in any optimiser, but moments stay in bfloat16; torch would convert them to float32."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: state[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")})

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        exp_avg, exp_avg_sq = _own_part(state["exp_avg"]), _own_part(state["exp_avg_sq"])
        parameter, gradient = _own_part(parameter), _own_part(gradient)
        first = exp_avg.float().lerp_(gradient, 1 - beta1)
        second = exp_avg_sq.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = math.sqrt(1 - beta2 ** state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        parameter.addcdiv_(first, (second.sqrt() / scale).add_(group["eps"]), value=-step_size)
        exp_avg.copy_(_rounded(first))
        exp_avg_sq.copy_(_rounded(second))


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process' shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """`values` rounded stochastically to one of the two nearest bfloat16 numbers, as float32."""
    bits = values.view(torch.int32)
    return bits.add(torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16).view(torch.float32)
