"""A chunk of actions by denoising: OpenVLA-OFT's diffusion head and its DDIM schedule."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from openvla_lightning.model.projector import MLP
from openvla_lightning.action_head.regression import MLPResNet


class DDIM:
    """The schedule that diffusers' `DDIMScheduler(num_train_timesteps, beta_schedule="squaredcos_cap_v2")` has.

    Its other settings are the defaults: the network predicts the noise, the denoised sample is clipped to [-1, 1] (and
    the noise is not derived anew from it), timesteps are spaced from the first one (`leading`), the last step ends at
    alpha 1, and no noise is added on the way (eta 0).

    Args:
        train_steps: how many noise levels there are.
    """

    def __init__(self, train_steps: int = 50) -> None:
        self.train_steps = train_steps

        def signal(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        levels = [1 - signal((i + 1) / train_steps) / signal(i / train_steps) for i in range(train_steps)]
        self.betas = torch.tensor([min(beta, 0.999) for beta in levels], dtype=torch.float32)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)

    def add_noise(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples [B, ...] at noise levels `timesteps`, int64 [B]: sqrt(alpha) x + sqrt(1 - alpha) noise."""
        alpha = self.alphas_cumprod.to(samples.device)[timesteps].to(samples.dtype)
        alpha = alpha.reshape(-1, *[1] * (samples.ndim - 1))
        return alpha.sqrt() * samples + (1 - alpha).sqrt() * noise

    def timesteps(self, steps: int) -> list[int]:
        """Noise levels that denoising in so many steps visits, highest first.

        Raises:
            ValueError: for more steps than there are levels, or none.
        """
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"denoising takes 1 to {self.train_steps} steps, got {steps}")
        stride = self.train_steps // steps
        return [i * stride for i in reversed(range(steps))]

    def step(self, sample: Tensor, noise: Tensor, timestep: int, steps: int) -> Tensor:
        """The sample one of `steps` steps later, from the noise that was predicted in it at `timestep`."""
        alpha = float(self.alphas_cumprod[timestep])
        before = timestep - self.train_steps // steps
        alpha_before = float(self.alphas_cumprod[before]) if before >= 0 else 1.0
        clean = ((sample - (1 - alpha) ** 0.5 * noise) / alpha**0.5).clamp(-1, 1)
        return alpha_before**0.5 * clean + (1 - alpha_before) ** 0.5 * noise

    def denoise(self, noise: Tensor, predict: Callable[[Tensor, int], Tensor], steps: int) -> Iterator[Tensor]:
        """The samples after each of `steps` steps from pure noise; `predict` gives the noise in (sample, timestep)."""
        sample = noise
        for timestep in self.timesteps(steps):
            sample = self.step(sample, predict(sample, timestep), timestep, steps)
            yield sample


def time_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of integers [B] at dim / 2 frequencies from 1 to 1/10000: float32 [B, dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class NoisePredictor(nn.Module):
    """The network under its released name, as its own module."""

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.mlp_resnet = MLPResNet(dim * action_dim, dim, action_dim)


class DiffusionNetwork(nn.Module):
    """Embeds a noisy chunk, and reads the noise in it off the hidden states at its places.

    The noise level is not told to the network here: it reached the hidden states as a token of its own.

    Args:
        dim: width of a hidden state.
        action_dim: D, action dimensions.
    """

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.dim, self.action_dim = dim, action_dim
        self.noise_predictor = NoisePredictor(dim, action_dim)
        self.noisy_action_projector = MLP(1, dim)

    def slots(self, noisy: Tensor) -> Tensor:
        """Embeddings [B, T * D, dim] of noisy chunks [B, T, D], one for each number."""
        return self.noisy_action_projector(noisy.flatten(1)[..., None].to(self.noisy_action_projector.fc1.weight.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T * D, dim] -> noise [B, T, D]."""
        hidden = hidden.to(self.noise_predictor.mlp_resnet.fc1.weight.dtype)
        return self.noise_predictor.mlp_resnet(hidden.reshape(len(hidden), -1, self.action_dim * self.dim))
