"""Gaussian diffusion over action chunks: adding noise, and removing it in few steps.

Tables are float64 and are read as float32, as in the released code of CogACT. Predictions are of the noise (epsilon).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ScheduleName = Literal["squaredcos_cap_v2", "linear"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""Noisy actions [B, T, D] and their timesteps, int64 [B] -> predicted noise [B, T, D]."""


def sources(numbers: Sequence[int], seed: int) -> list[np.random.Generator]:
    """A random generator for each sample, seeded by its place in the order of training.

    So the draws depend neither on the number of processes nor on earlier draws, and a resumed run draws the same
    numbers as an uninterrupted one.
    """
    return [np.random.Generator(np.random.Philox(key=[seed, number])) for number in numbers]


class NoiseSchedule:
    """The share of signal in a noisy action at each timestep, and two sampling methods: DDIM and DDPM.

    Args:
        steps: timesteps of training.
        name: `squaredcos_cap_v2` (Nichol and Dhariwal 2021, betas at most 0.999) or `linear` (Ho et al. 2020).

    Attributes:
        betas, alphas_cumprod: float64 [steps].

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, steps: int = 100, name: ScheduleName = "squaredcos_cap_v2") -> None:
        self.steps, self.name = steps, name
        if name == "squaredcos_cap_v2":
            bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
            self.betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        elif name == "linear":
            scale = 1000 / steps
            self.betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
        else:
            raise ValueError(f"unknown noise schedule {name!r}; there are squaredcos_cap_v2 and linear")
        self.alphas_cumprod = np.cumprod(1 - self.betas)

    def noised(self, actions: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Actions [B, T, D] mixed with noise of the same shape, at noise level `timestep`, int64 [B]."""
        bar = self.alphas_cumprod
        return _rows(np.sqrt(bar), timestep) * actions + _rows(np.sqrt(1 - bar), timestep) * noise

    def clean(self, noisy: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The clean actions of `noisy` [B, T, D] at `timestep` [B], given its noise."""
        bar = self.alphas_cumprod
        return _rows(np.sqrt(1 / bar), timestep) * noisy - _rows(np.sqrt(1 / bar - 1), timestep) * noise

    def kept(self, count: int) -> list[int]:
        """The ascending timesteps for sampling in `count` steps: multiples of one stride, as in the released code.

        Raises:
            ValueError: no integer stride gives exactly `count`; the message names the nearest possible counts.
        """
        if count == 1:
            return [self.steps // 2]
        for stride in range(1, self.steps + 1):
            if len(chosen := range(0, self.steps, stride)) == count:
                return list(chosen)
        possible = sorted({len(range(0, self.steps, stride)) for stride in range(1, self.steps + 1)})
        near = sorted(possible, key=lambda n: abs(n - count))[:3]
        raise ValueError(f"{count} steps do not divide {self.steps} timesteps; the nearest that do: {sorted(near)}")

    def ddim_step(
        self,
        noisy: Tensor,
        noise: Tensor,
        now: int,
        before: int | None,
        clip: bool = False,
        renoise: bool = True,
        eta: float = 0.0,
        draw: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of DDIM (Song et al. 2021): noisy actions [B, T, D] at timestep `before`, and the clean estimate.

        Args:
            noisy, noise: the actions at timestep `now`, and the noise predicted in them.
            now, before: timesteps; `before` is None in the last step, after which no noise is left.
            clip: clip the clean estimate to [-1, 1].
            renoise: recompute the noise from the clipped estimate, as CogACT does; diffusers does not.
            eta: share of fresh noise (0: none), which `draw`, standard normal [B, T, D], provides.
        """
        bar = float(self.alphas_cumprod[now])
        bar_before = 1.0 if before is None else float(self.alphas_cumprod[before])
        clean = (noisy - (1 - bar) ** 0.5 * noise) / bar**0.5
        if clip:
            clean = clean.clamp(-1, 1)
            if renoise:
                noise = (noisy - bar**0.5 * clean) / (1 - bar) ** 0.5
        fresh = eta * ((1 - bar_before) / (1 - bar)) ** 0.5 * (1 - bar / bar_before) ** 0.5
        moved = bar_before**0.5 * clean + (1 - bar_before - fresh**2) ** 0.5 * noise
        return (moved if draw is None or before is None else moved + fresh * draw), clean

    def ddim(
        self,
        predict: Predict,
        noise: Tensor,
        count: int = 10,
        clip: bool = False,
        renoise: bool = True,
        eta: float = 0.0,
        draws: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Noisy actions and the clean estimate after each of `count` steps from pure noise [B, T, D].

        Args:
            predict: see `Predict`.
            noise: start of the sampling.
            draws: standard normal [count, B, T, D], used if `eta` is above 0.
            count, clip, renoise, eta: see `kept` and `ddim_step`.
        """
        kept, noisy = self.kept(count), noise
        for step, now in enumerate(reversed(kept)):
            before = kept[-step - 2] if step + 1 < len(kept) else None
            timestep = torch.full((len(noisy),), now, device=noisy.device)
            draw = None if draws is None else draws[step]
            noisy, clean = self.ddim_step(noisy, predict(noisy, timestep), now, before, clip, renoise, eta, draw)
            yield noisy, clean

    def posterior(self, noisy: Tensor, clean: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, T, D] and log variance [B, 1, 1] one timestep earlier, given the clean actions (DDPM, eq. 6-7).

        The variance is the smaller of the two fixed ones; it is 0 at timestep 0, where the logarithm of timestep 1 is
        used.
        """
        bar, betas = self.alphas_cumprod, self.betas
        before = np.append(1.0, bar[:-1])
        variance = betas * (1 - before) / (1 - bar)
        mean = (
            _rows(betas * np.sqrt(before) / (1 - bar), timestep) * clean
            + _rows((1 - before) * np.sqrt(1 - betas) / (1 - bar), timestep) * noisy
        )
        return mean, _rows(np.log(np.append(variance[1], variance[1:])), timestep)

    def ddpm(
        self, predict: Predict, noise: Tensor, draws: Tensor, clip: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Noisy actions and the clean estimate after each of all timesteps, last to first (Ho et al. 2020).

        Args:
            predict: see `Predict`.
            noise: start of the sampling [B, T, D].
            draws: standard normal [steps, B, T, D], in the order of sampling; the last one is not used.
            clip: clip the clean estimate to [-1, 1].
        """
        noisy = noise
        for step, now in enumerate(reversed(range(self.steps))):
            timestep = torch.full((len(noisy),), now, device=noisy.device)
            clean = self.clean(noisy, predict(noisy, timestep), timestep)
            clean = clean.clamp(-1, 1) if clip else clean
            mean, log_variance = self.posterior(noisy, clean, timestep)
            noisy = mean if now == 0 else mean + (0.5 * log_variance).exp() * draws[step]
            yield noisy, clean


def _rows(table: np.ndarray, timestep: Tensor) -> Tensor:
    """Entries of a table for each sample, float32 [B, 1, 1]."""
    return torch.from_numpy(table).float().to(timestep.device, non_blocking=True)[timestep][:, None, None]
