"""Chunks of actions by flow matching: a small transformer beside the language model turns noise into actions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from openvla_lightning.action_head.base import Acting, Decoder, check_chunk, on_device, options_of
from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.flow_matching import FlowMatching, check_steps
from openvla_lightning.action_head.flow_network import FlowNetwork
from openvla_lightning.action_head.noise_schedule import sources
from openvla_lightning.action_head.regression import mean_where
from openvla_lightning.model.sequence import Read
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import Batch, Inputs, Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric


class FlowHead:
    """Actions by flow matching, from the hidden states of the whole prompt (as in GR00T, arXiv 2503.14734).

    The language model reads image and prompt once. In every Euler step, the network attends to its hidden states by
    cross-attention.

    Args:
        action_chunk: T, actions in a chunk.
        action_dim: D, action dimensions.
        width, depth, heads: of the network (`FlowNetwork`).
        noise_at, alpha, beta, scale, offset: the convention and the times of training (`FlowMatching`).
        steps: Euler steps when acting.
        repeats: how many flow times are learnt for each sample per pass of the language model.
        read_layer: how many layers of the language model run before the network reads the hidden states; acting
            skips the other layers. None: all layers.
        insulate: knowledge insulation (arXiv 2505.23705): the network's gradients stop at the hidden states, and the
            language model instead learns to write the same chunks as FAST tokens. Acting uses only the flow.
        text_weight: weight of the FAST tokens' loss.
        tokenizer, vocab_size: arguments of FAST (`FastHead`).
        proprio_dim: P, numbers of the robot's state that the network itself reads; 0: none.
        seed: seeds the noise in training, together with each sample's place in the order of training.
    """

    def __init__(
        self,
        action_chunk: int = 8,
        action_dim: int = 7,
        width: int = 512,
        depth: int = 8,
        heads: int = 8,
        noise_at: Literal[0, 1] = 1,
        alpha: float = 1.5,
        beta: float = 1.0,
        scale: float = 0.999,
        offset: float = 0.001,
        steps: int = 10,
        repeats: int = 4,
        read_layer: int | None = None,
        insulate: bool = False,
        text_weight: float = 1.0,
        tokenizer: str | Path | Mapping[str, Any] | None = None,
        vocab_size: int = 32000,
        proprio_dim: int = 0,
        seed: int = 0,
    ) -> None:
        if action_chunk < 1 or repeats < 1:
            raise ValueError(f"action_chunk and repeats must be at least 1, got {action_chunk} and {repeats}")
        self.action_chunk, self.action_dim, self.proprio_dim = action_chunk, action_dim, proprio_dim
        self.size = {"width": width, "depth": depth, "heads": heads}
        self.flow = FlowMatching(noise_at, alpha, beta, scale, offset, steps)
        self.repeats, self.read_layer, self.seed = repeats, read_layer, seed
        self.insulate, self.text_weight, self.vocab_size = insulate, text_weight, vocab_size
        self.text = FastHead(tokenizer, vocab_size, action_chunk) if insulate else None

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        flow = self.flow
        return {
            "action_chunk": self.action_chunk,
            "action_dim": self.action_dim,
            **self.size,
            **{name: getattr(flow, name) for name in ("noise_at", "alpha", "beta", "scale", "offset", "steps")},
            "repeats": self.repeats,
            "read_layer": self.read_layer,
            "insulate": self.insulate,
            "text_weight": self.text_weight,
            "tokenizer": None if self.text is None else self.text.config["tokenizer"],
            "vocab_size": self.vocab_size,
            "proprio_dim": self.proprio_dim,
            "seed": self.seed,
        }

    def write(self, actions: Tensor | None, rows: int, dim: int, end: int) -> list[list[int]]:
        """Nothing; with insulation, FAST tokens in training.

        Raises:
            ValueError: for actions of another shape than [B, T, D].
        """
        check_chunk(self.action_chunk, self.action_dim, actions, dim)
        return [[] for _ in range(rows)] if self.text is None else self.text.write(actions, rows, dim, end)

    def network(self, dim: int) -> nn.Module | None:
        """The transformer, beside a language model `dim` wide."""
        return FlowNetwork(dim, self.action_dim, self.action_chunk, **self.size, proprio_dim=self.proprio_dim)

    def loss(self, vla: VLA, batch: Batch) -> tuple[Tensor, Prediction]:
        """Mean squared error of the velocity, without padded actions; with insulation, plus the FAST tokens' loss.

        In training, the prediction is the end of the straight line through the noisy actions; otherwise it is the
        sampled actions.
        """
        read = vla.read(batch, self.read_layer, logits=self.text is not None)
        noise, time = self.draw(batch)
        loss, clean = self.velocity_loss(vla, read, batch, noise, time)
        if self.text is not None:
            assert read.logits is not None
            loss = loss + self.text_weight * self.text.criterion(read.logits, batch)
        with torch.no_grad():
            actions = (
                clean[: len(batch)] if vla.training else self.sample(vla, read, batch.proprio, noise[: len(batch)])
            )
        return loss, Prediction(actions=actions, targets=batch.actions)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise [R * B, T, D] and times [R * B]: R repeats of the whole batch, one after the other."""
        noise, time = [], []
        for source in sources(batch.numbers, self.seed):
            noise.append(source.standard_normal((self.repeats, *batch.actions.shape[1:]), np.float32))
            time.append([self.flow.draw(source) for _ in range(self.repeats)])
        device = batch.actions.device
        drawn = torch.from_numpy(np.stack(noise, axis=1)).flatten(0, 1).to(device, non_blocking=True)
        return drawn, self.flow.time(torch.tensor(time).T.flatten()).to(device, non_blocking=True)

    def velocity_loss(self, vla: VLA, read: Read, batch: Batch, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the velocity for this noise [R * B, T, D] at these times [R * B], and the actions it leads to."""
        times = len(noise) // len(batch)
        actions = batch.actions.repeat(times, 1, 1)
        moving = self.flow.on_the_way(actions, noise, time)
        states = read.states.detach() if self.insulate else read.states
        velocity = self._velocity(
            vla, moving, time, states.repeat(times, 1, 1), read.prompt.repeat(times, 1), _repeated(batch.proprio, times)
        )
        error = (velocity - self.flow.target(actions, noise)) ** 2
        loss = mean_where(error, _repeated(batch.padded, times))
        return loss, self.flow.clean(moving, velocity.detach(), time)

    def sample(self, vla: VLA, read: Read, proprio: Tensor | None, noise: Tensor, steps: int | None = None) -> Tensor:
        """Sample actions float32 [B, T, D] from noise of the same shape."""
        network: Any = vla.action_head
        keys_values = network.read(read.states.to(network.action_in.weight.dtype))
        *_, (actions, _) = self.flow.sample(
            lambda moving, time: self._velocity(vla, moving, time, keys_values, read.prompt, proprio), noise, steps
        )
        return actions

    def metrics(self, datasets: Sequence[str]) -> "Metric":
        """L1, overall and for each of `datasets`."""
        from openvla_lightning.action_head.metrics import ActionMetrics  # torchmetrics takes a second

        return ActionMetrics(datasets)

    def decoder(self, vla: VLA, acting: Acting) -> Decoder:
        """One pass of the language model, then `steps` (its option) of the network.

        All robots of a batch start from the same noise, so that an action does not depend on the batch.
        """
        steps = check_steps(options_of(self, acting, {"steps": self.flow.steps})["steps"])

        @torch.inference_mode()
        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            device_inputs = on_device(inputs, vla, acting)
            read = vla.read(device_inputs, self.read_layer)
            acting.clock("prefill")
            noise = torch.randn(1, self.action_chunk, self.action_dim, generator=generator)
            noise = noise.to(device_inputs.input_ids.device, non_blocking=True).expand(len(device_inputs), -1, -1)
            actions = self.sample(vla, read, device_inputs.proprio, noise, steps)
            acting.clock("decode")
            return actions

        return decode

    def _velocity(
        self, vla: VLA, moving: Tensor, time: Tensor, context: Any, prompt: Tensor, proprio: Tensor | None
    ) -> Tensor:
        network: Any = vla.action_head
        dtype = network.action_in.weight.dtype
        if isinstance(context, Tensor):
            context = context.to(dtype)
        return network(moving.to(dtype), time, context, prompt, proprio if self.proprio_dim else None).float()


def _repeated(values: Tensor | None, times: int) -> Tensor | None:
    return None if values is None else values.repeat(times, *[1] * (values.ndim - 1))
