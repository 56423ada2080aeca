"""Chunks of actions by diffusion from one hidden state, the cognition token: CogACT's head (arXiv 2411.19650)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from openvla_lightning.action_head.base import Acting, Decoder, check_chunk, on_device, options_of
from openvla_lightning.action_head.cogact_network import CogACTNetwork
from openvla_lightning.action_head.noise_schedule import NoiseSchedule, sources
from openvla_lightning.action_head.regression import mean_where
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import Batch, Inputs, Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric


class CogACTHead:
    """Actions by diffusion, from the hidden state at the end token after the prompt.

    Args:
        action_chunk: T, actions in a chunk (16 as released).
        action_dim: D, action dimensions.
        hidden, depth, heads: of the network; released: S 384, 6, 4; B 768, 12, 12; L 1024, 24, 16.
        train_steps: number of noise levels.
        steps: DDIM steps when acting; 0: all noise levels, with fresh noise in each (DDPM).
        guidance: classifier-free guidance when acting; 1: none.
        drop: share of training samples whose cognition is replaced by a learnt vector, which guidance needs.
        repeats: how many noise levels are learnt for each sample per pass of the language model (4 as released).
        gripper: dimension that is rounded to 0 or 1 after sampling, as released; None: none.
        seed: seeds the noise in training, together with each sample's place in the order of training.
    """

    def __init__(
        self,
        action_chunk: int = 16,
        action_dim: int = 7,
        hidden: int = 768,
        depth: int = 12,
        heads: int = 12,
        train_steps: int = 100,
        steps: int = 10,
        guidance: float = 1.5,
        drop: float = 0.1,
        repeats: int = 4,
        gripper: int | None = -1,
        seed: int = 0,
    ) -> None:
        if action_chunk < 1 or repeats < 1:
            raise ValueError(f"action_chunk and repeats must be at least 1, got {action_chunk} and {repeats}")
        self.action_chunk, self.action_dim = action_chunk, action_dim
        self.size = {"hidden": hidden, "depth": depth, "heads": heads}
        self.schedule, self.steps = NoiseSchedule(train_steps), steps
        if steps:
            self.schedule.kept(steps)
        self.guidance, self.drop, self.repeats, self.gripper, self.seed = guidance, drop, repeats, gripper, seed

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {
            "action_chunk": self.action_chunk,
            "action_dim": self.action_dim,
            **self.size,
            "train_steps": self.schedule.steps,
            **{name: getattr(self, name) for name in ("steps", "guidance", "drop", "repeats", "gripper", "seed")},
        }

    def write(self, actions: Tensor | None, rows: int, dim: int, end: int) -> list[list[int]]:
        """The end token, in training and when acting; its hidden state is the cognition.

        Raises:
            ValueError: for actions of another shape than [B, T, D].
        """
        check_chunk(self.action_chunk, self.action_dim, actions, dim)
        return [[end] for _ in range(rows)]

    def network(self, dim: int) -> nn.Module | None:
        """The diffusion transformer, beside a language model `dim` wide."""
        return CogACTNetwork(dim, self.action_dim, self.action_chunk, **self.size, drop=self.drop)

    def loss(self, vla: VLA, batch: Batch) -> tuple[Tensor, Prediction]:
        """Mean squared error of the predicted noise over the actions that are not padded.

        In training, the prediction is the clean chunk estimated in one step; otherwise it is the sampled actions.
        """
        cognition = self.cognition(vla, batch)
        noise, timesteps, uniform = self.draw(batch)
        dropped = uniform < self.drop if vla.training else None
        loss, clean = self.denoising_loss(vla, batch, cognition, noise, timesteps, dropped)
        with torch.no_grad():
            actions = clean[: len(batch)]
            if not vla.training:
                actions = self.sample(vla, cognition, noise[: len(batch)], self.steps or None, self.guidance)
        return loss, Prediction(actions=actions, targets=batch.actions)

    def cognition(self, vla: VLA, inputs: Inputs) -> Tensor:
        """Hidden states [B, 1, dim] at the end tokens that `write` put after the prompts."""
        return vla.states(replace(inputs, places=inputs.places[:, :1] + 1))

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noise [R * B, T, D], noise levels and uniform numbers [R * B]: R repeats of the whole batch, one by one."""
        noise, levels, uniform = [], [], []
        for source in sources(batch.numbers, self.seed):
            noise.append(source.standard_normal((self.repeats, *batch.actions.shape[1:]), np.float32))
            levels.append(source.integers(self.schedule.steps, size=self.repeats))
            uniform.append(source.random(self.repeats, np.float32))
        device = batch.actions.device
        drawn = (torch.from_numpy(np.stack(values, axis=1)).flatten(0, 1) for values in (noise, levels, uniform))
        first, second, third = (values.to(device, non_blocking=True) for values in drawn)
        return first, second, third

    def denoising_loss(
        self, vla: VLA, batch: Batch, cognition: Tensor, noise: Tensor, timesteps: Tensor, dropped: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss with this noise [R * B, T, D] at these levels [R * B], and the estimated clean chunks, within [-1, 1].

        Args:
            vla: the model whose `action_head` predicts.
            batch: of B samples.
            cognition: [B, 1, dim].
            noise, timesteps: R repeats of the whole batch, one after the other, as released.
            dropped: bool [R * B], which of them do not see their cognition.
        """
        times = len(noise) // len(batch)
        actions = batch.actions.repeat(times, 1, 1)
        noisy = self.schedule.noised(actions, noise, timesteps)
        network: Any = vla.action_head
        dtype = network.positional_embedding.dtype
        predicted = network(noisy.to(dtype), timesteps, cognition.repeat(times, 1, 1).to(dtype), dropped).float()
        padded = None if batch.padded is None else batch.padded.repeat(times, 1)
        loss = mean_where((predicted - noise) ** 2, padded)
        return loss, self.schedule.clean(noisy, predicted.detach(), timesteps).clamp(-1, 1)

    def sample(
        self,
        vla: VLA,
        cognition: Tensor,
        noise: Tensor,
        steps: int | None = 10,
        guidance: float = 1.5,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Normalised actions float32 [B, T, D] in [-1, 1], the gripper 0 or 1.

        Args:
            vla: the model whose `action_head` predicts.
            cognition: [B, 1, dim].
            noise: start of the sampling [B, T, D].
            steps: DDIM steps; None: DDPM, which needs `draws`, fresh noise [train_steps, B, T, D].
            guidance: see the class.
            draws: see `steps`.
        """
        network: Any = vla.action_head
        dtype = network.positional_embedding.dtype
        cognition = cognition.to(dtype)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return network.guided(noisy.to(dtype), timestep, cognition, guidance).float()

        if steps is None:
            if draws is None:
                draws = torch.zeros(self.schedule.steps, *noise.shape, device=noise.device)
            *_, (actions, _) = self.schedule.ddpm(predict, noise, draws)
        else:
            *_, (actions, _) = self.schedule.ddim(predict, noise, steps)
        return self.finished(actions)

    def finished(self, actions: Tensor) -> Tensor:
        """Sampled actions [B, T, D], clipped to [-1, 1], with the gripper rounded to open or closed."""
        actions = actions.clamp(-1, 1)
        if self.gripper is not None:
            actions[..., self.gripper] = (actions[..., self.gripper] >= 0.5).to(actions.dtype)
        return actions

    def metrics(self, datasets: Sequence[str]) -> "Metric":
        """L1, overall and for each of `datasets`."""
        from openvla_lightning.action_head.metrics import ActionMetrics  # torchmetrics takes a second

        return ActionMetrics(datasets)

    def decoder(self, vla: VLA, acting: Acting) -> Decoder:
        """One pass of the language model, then `steps` of the network with `guidance` (its options).

        All robots of a batch start from the same noise, so that an action does not depend on the batch.
        """
        options = options_of(self, acting, {"steps": self.steps, "guidance": self.guidance})
        if options["steps"]:
            self.schedule.kept(options["steps"])

        @torch.inference_mode()
        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            device_inputs = on_device(inputs, vla, acting)
            cognition = self.cognition(vla, device_inputs)
            acting.clock("prefill")
            fresh = 0 if options["steps"] else self.schedule.steps
            drawn = torch.randn(1 + fresh, 1, self.action_chunk, self.action_dim, generator=generator)
            drawn = drawn.to(device_inputs.input_ids.device, non_blocking=True)
            noise, *draws = drawn.expand(-1, len(device_inputs), -1, -1)
            later = torch.stack(draws) if draws else None
            actions = self.sample(vla, cognition, noise, options["steps"] or None, options["guidance"], later)
            acting.clock("decode")
            return actions

        return decode
