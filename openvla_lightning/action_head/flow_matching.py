"""Flow matching over action chunks: the network learns the velocity of a straight path from noise to actions.

See Lipman et al. 2023. There are two conventions: in openpi (pi0), noise is at time 1 and time decreases; in GR00T and
StarVLA, noise is at time 0 and time increases. Here `noise_at` sets the convention.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Noisy actions [B, T, D] and times [B] -> velocity [B, T, D]."""


class FlowMatching:
    """Times, targets and Euler steps.

    Args:
        noise_at: the time at which actions are pure noise, 1 (pi0) or 0 (GR00T).
        alpha, beta: parameters of the Beta distribution of the share of noise in training; the published 1.5 and 1
            prefer noisy actions.
        scale, offset: the share of noise is Beta * scale + offset, at most 1; pi0: 0.999 and 0.001, GR00T: 1 / 0.999
            and 0.
        steps: Euler steps of sampling.

    Raises:
        ValueError: for a `noise_at` other than 0 and 1, or no step.
    """

    def __init__(
        self,
        noise_at: Literal[0, 1] = 1,
        alpha: float = 1.5,
        beta: float = 1.0,
        scale: float = 0.999,
        offset: float = 0.001,
        steps: int = 10,
    ) -> None:
        if noise_at not in (0, 1):
            raise ValueError(f"noise_at={noise_at} must be 1, as in pi0, or 0, as in GR00T")
        self.noise_at, self.alpha, self.beta, self.scale, self.offset = noise_at, alpha, beta, scale, offset
        self.steps = check_steps(steps)

    def draw(self, source: np.random.Generator) -> float:
        """One draw from the Beta distribution: a share of noise before scale and offset."""
        return float(source.beta(self.alpha, self.beta))

    def time(self, draws: Tensor) -> Tensor:
        """Training times [B], in [0, 1], from draws [B] of the Beta distribution."""
        noise = (draws * self.scale + self.offset).clamp(max=1.0)
        return noise if self.noise_at == 1 else 1 - noise

    def on_the_way(self, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Actions [B, T, D] at `time` [B], on the straight line to noise of the same shape."""
        share = self._share_of_noise(time)[:, None, None]
        return share * noise + (1 - share) * actions

    def target(self, actions: Tensor, noise: Tensor) -> Tensor:
        """The velocity along the line for increasing time, [B, T, D]."""
        return noise - actions if self.noise_at == 1 else actions - noise

    def clean(self, moving: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
        """The actions [B, T, D] at the end of the line through `moving` with this velocity."""
        share = self._share_of_noise(time)[:, None, None]
        return moving - share * velocity if self.noise_at == 1 else moving + share * velocity

    def sample(self, velocity: Velocity, noise: Tensor, steps: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The actions after each Euler step from pure noise [B, T, D], and the time [] at which the step was taken.

        Times are summed in float32, as released, and the network sees these values.

        Args:
            velocity: see `Velocity`.
            noise: start of the sampling.
            steps: number of steps; None: the class's `steps`.
        """
        count = self.steps if steps is None else steps
        change = torch.full((), (1 - 2 * self.noise_at) / count, dtype=torch.float32, device=noise.device)
        time = torch.full_like(change, self.noise_at)
        moving = noise
        for _ in range(count):
            moving = moving + change.to(noise.dtype) * velocity(moving, time.expand(len(noise)))
            yield moving, time
            time = time + change

    def _share_of_noise(self, time: Tensor) -> Tensor:
        return time if self.noise_at == 1 else 1 - time


def check_steps(steps: int) -> int:
    """Return a number of Euler steps.

    Raises:
        ValueError: for no step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    return steps


def time_embedding(time: Tensor, width: int, shortest: float = 4e-3, longest: float = 4.0) -> Tensor:
    """Sines, then cosines, of times [B] with periods from `shortest` to `longest`, both included: float32 [B, width].

    As released in openpi, whose angles are float64.
    """
    apple = time.device.type == "mps"  # Apple's GPUs lack float64
    places = torch.linspace(0, 1, width // 2, dtype=torch.float64, device="cpu" if apple else time.device)
    frequencies = 2 * math.pi / (shortest * (longest / shortest) ** places)
    frequencies = frequencies.float().to(time.device) if apple else frequencies
    angles = time[:, None].to(frequencies.dtype) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
