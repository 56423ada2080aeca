"""OpenVLA-OFT's diffusion head, which predicts a chunk of actions by denoising."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from openvla_lightning.action_head.base import Acting, Decoder, on_device, options_of
from openvla_lightning.action_head.noise_schedule import NoiseSchedule, Predict, sources
from openvla_lightning.action_head.regression import L1Head, MLPResNet, mean_where, normalised
from openvla_lightning.model.parallel_decoding import ParallelReader
from openvla_lightning.model.projector import MLP
from openvla_lightning.types import Batch, Inputs, Prediction

if TYPE_CHECKING:
    from openvla_lightning.model.vla import VLA


class DiffusionHead(L1Head):
    """Predicts a whole chunk by denoising; the loss is the squared error of the predicted noise.

    Each place in the text holds one number of the noisy actions; a token before the text encodes the noise level. Each
    denoising step runs the language model once; the vision backbone runs once for all steps.

    Args:
        action_chunk: T, actions in a chunk.
        action_dim: D, action dimensions.
        train_steps: number of noise levels.
        steps: denoising steps when acting (50 as released).
        seed: seeds the noise in training, together with each sample's place in the order of training. So the noise does
            not depend on the number of processes, and a resumed run draws the same noise as an uninterrupted one.
    """

    def __init__(
        self, action_chunk: int = 8, action_dim: int = 7, train_steps: int = 50, steps: int = 50, seed: int = 0
    ) -> None:
        super().__init__(action_chunk, action_dim)
        self.schedule, self.steps, self.seed = NoiseSchedule(train_steps), steps, seed
        self.schedule.kept(steps)

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        arguments = {"train_steps": self.schedule.steps, "steps": self.steps, "seed": self.seed}
        return {**super().config, **arguments}

    def network(self, dim: int) -> nn.Module | None:
        """The network that embeds noisy actions and predicts the noise from hidden states `dim` wide."""
        return DiffusionNetwork(dim, self.action_dim)

    def loss(self, vla: "VLA", batch: Batch) -> tuple[Tensor, Prediction]:
        """Mean squared error of the noise predicted in noisy actions, at one noise level for each sample.

        The prediction is the clean chunk estimated in one step.
        """
        noise, timesteps = self.draw(batch)
        return self.denoising_loss(vla, batch, noise, timesteps)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise [B, T, D] and noise levels, int64 [B], for these samples."""
        shape = tuple(batch.actions.shape[1:])
        draws = sources(batch.numbers, self.seed)
        noise = np.stack([draw.standard_normal(shape, np.float32) for draw in draws])
        levels = np.array([draw.integers(self.schedule.steps) for draw in draws], np.int64)
        device = batch.actions.device
        drawn = (torch.from_numpy(noise), torch.from_numpy(levels))
        first, second = (values.to(device, non_blocking=True) for values in drawn)
        return first, second

    def denoising_loss(self, vla: "VLA", batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Prediction]:
        """As `loss`, with this noise [B, T, D] at these levels [B]."""
        noisy = self.schedule.noised(batch.actions, noise, timesteps)
        predicted = self.noise(vla, batch, noisy, timesteps)
        loss = mean_where((predicted - noise) ** 2, batch.padded)
        clean = self.schedule.clean(noisy, predicted.detach(), timesteps).clamp(-1, 1)
        return loss, Prediction(actions=clean, targets=batch.actions)

    def noise(
        self,
        vla: "VLA",
        inputs: Inputs,
        noisy: Tensor,
        timesteps: Tensor,
        visual: Tensor | None = None,
        reader: ParallelReader | None = None,
    ) -> Tensor:
        """The noise float32 [B, T, D] in `noisy` at levels `timesteps`, int64 [B]; a `reader` makes this faster."""
        network: Any = vla.action_head
        extra = time_embedding(timesteps, vla.llm.dim)[:, None]
        inputs = replace(inputs, places=inputs.places[:, : self.places])
        if reader is None:
            slots = partial(network.slots, noisy)
            hidden = vla.states(inputs, slots=slots, extra=extra, causal=False, visual=visual)
        else:
            hidden = reader.states(inputs, slots=network.slots(noisy), extra=extra, visual=visual)
        return network(hidden).float()

    def denoise(self, vla: "VLA", inputs: Inputs, noise: Tensor, steps: int | None = None) -> Iterator[Tensor]:
        """The chunk [B, T, D] after each denoising step, from pure noise of that shape."""
        visual = vla.see(inputs, self.places)

        def predict(sample: Tensor, levels: Tensor) -> Tensor:
            return self.noise(vla, inputs, sample, levels, visual)

        return self._ddim(predict, noise, steps or self.steps)

    def _ddim(self, predict: Predict, noise: Tensor, steps: int) -> Iterator[Tensor]:
        """As diffusers' `DDIMScheduler` with its default settings: clean estimates are clipped, the noise is not."""
        for sample, _ in self.schedule.ddim(predict, noise, steps, clip=True, renoise=False):
            yield sample

    def decoder(self, vla: "VLA", acting: Acting) -> Decoder:
        """A decoder that starts from noise of the generator on the CPU. Its option is `steps`, of denoising."""
        steps = options_of(self, acting, {"steps": self.steps})["steps"]
        self.schedule.kept(steps)
        chunk = (self.action_chunk, self.action_dim)
        if not acting.static:

            def plain(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
                noise = start_noise(len(inputs), chunk, generator)
                device_inputs = on_device(inputs, vla, acting)
                *_, actions = self.denoise(vla, device_inputs, noise.to(device_inputs.input_ids.device), steps)
                return actions

            return plain
        reader = ParallelReader(vla, acting.compile)
        see = reader.captured(lambda inputs: vla.see(normalised(inputs, acting), self.places))

        def noise_in(inputs: Inputs, visual: Tensor, sample: Tensor, levels: Tensor) -> Tensor:
            return self.noise(vla, inputs, sample, levels, visual, reader)

        predict = reader.captured(noise_in)

        @torch.inference_mode()
        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            noise = start_noise(len(inputs), chunk, generator)
            arranged = reader.arranged(inputs)
            rows = torch.arange(len(arranged)).clamp(max=len(inputs) - 1)  # the rows of `arranged`
            acting.clock("copy")
            visual = see(arranged)
            acting.clock("vision")
            few = replace(arranged, pixel_values=arranged.pixel_values[:, :0])  # not copied at each step

            def noise_at(sample: Tensor, levels: Tensor) -> Tensor:
                return predict(few, visual, sample, levels)

            *_, actions = self._ddim(noise_at, noise[rows].to(reader.device, non_blocking=True), steps)
            acting.clock("decode")
            return actions[: len(inputs)]

        return decode


def start_noise(rows: int, chunk: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Noise [rows, T, D] to start from, equal for all rows, so that a row's result does not depend on its batch."""
    return torch.randn(1, *chunk, generator=generator).expand(rows, -1, -1)


def time_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of integers [B] at dim / 2 frequencies from 1 to 1/10000: float32 [B, dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class NoisePredictor(nn.Module):
    """The network as a separate module, under its released name."""

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.mlp_resnet = MLPResNet(dim * action_dim, dim, action_dim)


class DiffusionNetwork(nn.Module):
    """Embeds a noisy chunk, and predicts its noise from the hidden states at its places.

    This network does not get the noise level, because the hidden states already contain it through a separate token.

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
