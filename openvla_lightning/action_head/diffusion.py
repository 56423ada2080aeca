"""A chunk of actions by denoising: OpenVLA-OFT's diffusion head and its DDIM schedule."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from openvla_lightning.action_head.base import Acting, Decoder, on_device, options_of
from openvla_lightning.action_head.regression import L1Head, MLPResNet, mean_where
from openvla_lightning.model.projector import MLP
from openvla_lightning.types import Batch, Inputs, Prediction

if TYPE_CHECKING:
    from openvla_lightning.model.vla import VLA


class DiffusionHead(L1Head):
    """Actions by denoising, all of a chunk at once, learnt by the squared error of the predicted noise.

    The places in the text hold the noisy actions, one number each; a token before the text tells the noise level. Each
    denoising step runs the language model once, the vision backbone runs once for all of them.

    Args:
        action_chunk: T, actions in a chunk.
        action_dim: D, action dimensions.
        train_steps: noise levels.
        steps: how many denoising steps acting takes (50 as released).
        seed: of the noise in training, together with each sample's place in the order of training: it does not depend
            on how samples are spread over processes, and a run that goes on draws what it would have drawn.
    """

    def __init__(
        self, action_chunk: int = 8, action_dim: int = 7, train_steps: int = 50, steps: int = 50, seed: int = 0
    ) -> None:
        super().__init__(action_chunk, action_dim)
        self.schedule, self.steps, self.seed = DDIM(train_steps), steps, seed
        self.schedule.timesteps(steps)

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        own = {"train_steps": self.schedule.train_steps, "steps": self.steps, "seed": self.seed}
        return {**super().config, **own}

    def network(self, dim: int) -> nn.Module | None:
        """What embeds noisy actions, and reads the noise off hidden states `dim` wide."""
        return DiffusionNetwork(dim, self.action_dim)

    def loss(self, vla: "VLA", batch: Batch) -> tuple[Tensor, Prediction]:
        """Mean squared error of the noise predicted in noisy actions, at one noise level for each sample.

        The prediction is the chunk that remains when this noise is taken away at once.
        """
        noise, timesteps = self.draw(batch)
        return self.denoising_loss(vla, batch, noise, timesteps)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise [B, T, D] and noise levels, int64 [B], of these samples."""
        shape = tuple(batch.actions.shape[1:])
        draws = [np.random.Generator(np.random.Philox(key=[self.seed, number])) for number in batch.numbers]
        noise = np.stack([draw.standard_normal(shape, np.float32) for draw in draws])
        levels = np.array([draw.integers(self.schedule.train_steps) for draw in draws], np.int64)
        device = batch.actions.device
        return torch.from_numpy(noise).to(device), torch.from_numpy(levels).to(device)

    def denoising_loss(self, vla: "VLA", batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Prediction]:
        """As `loss`, with this noise [B, T, D] at these levels [B]."""
        noisy = self.schedule.add_noise(batch.actions, noise, timesteps)
        predicted = self.noise(vla, batch, noisy, timesteps)
        loss = mean_where((predicted - noise) ** 2, batch.padded)
        clean = self.schedule.clean(noisy, predicted.detach(), timesteps)
        return loss, Prediction(actions=clean, targets=batch.actions)

    def noise(
        self, vla: "VLA", inputs: Inputs, noisy: Tensor, timesteps: Tensor, visual: Tensor | None = None
    ) -> Tensor:
        """The noise float32 [B, T, D] in `noisy` at noise levels `timesteps`, int64 [B]."""
        network: Any = vla.action_head
        extra = time_embedding(timesteps, vla.llm.dim)[:, None]
        slots = network.slots(noisy)
        hidden = vla.states(inputs, slots=slots, extra=extra, causal=False, visual=visual)
        return network(hidden[:, : slots.shape[1]]).float()

    def denoise(self, vla: "VLA", inputs: Inputs, noise: Tensor, steps: int | None = None) -> Iterator[Tensor]:
        """The chunk [B, T, D] after each denoising step, from pure noise of that shape."""
        visual = vla.see(inputs, self.places)

        def predict(sample: Tensor, timestep: int) -> Tensor:
            levels = torch.full((len(sample),), timestep, device=sample.device)
            return self.noise(vla, inputs, sample, levels, visual)

        return self.schedule.denoise(noise, predict, steps or self.steps)

    def decoder(self, vla: "VLA", acting: Acting) -> Decoder:
        """From noise that the generator draws on the CPU. Its option: `steps`, of denoising."""
        steps = options_of(self, acting, {"steps": self.steps})["steps"]
        self.schedule.timesteps(steps)

        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            noise = torch.randn(len(inputs.input_ids), self.action_chunk, self.action_dim, generator=generator)
            given = on_device(inputs, vla, acting)
            *_, actions = self.denoise(vla, given, noise.to(given.input_ids.device), steps)
            return actions

        return decode


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

    def clean(self, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The samples [B, ...] without the noise that was predicted in them at levels int64 [B], within [-1, 1]."""
        alpha = self.alphas_cumprod.to(noisy.device)[timesteps].to(noisy.dtype)
        alpha = alpha.reshape(-1, *[1] * (noisy.ndim - 1))
        return ((noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1, 1)

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
