"""A chunk of actions in one forward pass, as numbers (OpenVLA-OFT, section IV: L1 regression)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from openvla_lightning.action_head.base import Acting, Decoder, Given, check_chunk, on_device, options_of
from openvla_lightning.model.parallel_decoding import BLANK, ParallelReader, parallel_states
from openvla_lightning.types import Batch, Inputs, Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric

    from openvla_lightning.model.vla import VLA


class L1Head:
    """Actions as numbers, all of a chunk at once, learnt by their absolute error.

    The text after the prompt is blank places, one for each number of the chunk, whose embeddings are zeros; attention
    goes in both directions, and the network reads the hidden states that would predict these places.

    Args:
        action_chunk: T, actions in a chunk.
        action_dim: D, action dimensions.
        error: `absolute`, as released, learns the median; `squared` learns the mean. The median of a dimension that
            rests in most steps is rest, and a model leaves it late.

    Raises:
        ValueError: for sizes below 1, or another error.
    """

    def __init__(
        self, action_chunk: int = 8, action_dim: int = 7, error: Literal["absolute", "squared"] = "absolute"
    ) -> None:
        if action_chunk < 1 or action_dim < 1:
            raise ValueError(f"action_chunk and action_dim must be at least 1, got {action_chunk} and {action_dim}")
        if error not in ("absolute", "squared"):
            raise ValueError(f"action_head.error={error} is not known; choose absolute or squared")
        self.action_chunk, self.action_dim, self.error = action_chunk, action_dim, error

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        own = {} if self.error == "absolute" else {"error": self.error}
        return {"action_chunk": self.action_chunk, "action_dim": self.action_dim, **own}

    @property
    def places(self) -> int:
        """How many numbers a chunk has, T * D."""
        return self.action_chunk * self.action_dim

    def write(self, actions: Tensor | None, rows: int, dim: int, end: int) -> list[list[int]]:
        """Blank ids, as many as numbers in a chunk, and the end token; also when acting, as released.

        Raises:
            ValueError: for actions of another shape than [B, T, D].
        """
        check_chunk(self.action_chunk, self.action_dim, actions, dim)
        return [[*[BLANK] * self.places, end] for _ in range(rows)]

    def network(self, dim: int) -> nn.Module | None:
        """What reads hidden states `dim` wide."""
        return L1Network(dim, self.action_dim)

    def loss(self, vla: "VLA", batch: Batch) -> tuple[Tensor, Prediction]:
        """Mean error over all numbers of the chunk, gripper included, where the chunk is not padded."""
        actions = self.predict(vla, batch)
        difference = actions - batch.actions
        error = difference.abs() if self.error == "absolute" else difference**2
        return mean_where(error, batch.padded), Prediction(actions=actions.detach(), targets=batch.actions)

    def metrics(self, datasets: Sequence[str]) -> "Metric":
        """L1, overall and for each of `datasets`."""
        from openvla_lightning.action_head.metrics import ActionMetrics  # torchmetrics takes a second

        return ActionMetrics(datasets)

    def predict(self, vla: "VLA", inputs: Inputs, reader: ParallelReader | None = None) -> Tensor:
        """Normalised actions float32 [B, T, D]; of a `reader` the same, sooner."""
        return vla.action_head(parallel_states(vla, inputs, self.places, reader)).float()

    def decoder(self, vla: "VLA", acting: Acting) -> Decoder:
        """One forward pass; nothing is drawn."""
        options_of(self, acting, {})
        if not acting.static:
            return lambda inputs, dim, generator: self.predict(vla, on_device(inputs, vla, acting))
        reader = ParallelReader(vla, acting.compile)
        act = reader.captured(lambda inputs: self.predict(vla, normalised(inputs, acting), reader))

        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            given = reader.arranged(inputs)
            acting.clock("copy")
            actions = act(given)[: len(inputs)].clone()
            acting.clock("decode")
            return actions

        return decode


def normalised(inputs: Given, acting: Acting) -> Given:
    """Inputs whose pixels the towers can read, where they are."""
    return replace(inputs, pixel_values=acting.normalise(inputs.pixel_values))


def mean_where(error: Tensor, padded: Tensor | None) -> Tensor:
    """Mean of errors [B, T, D] over the actions that `padded` [B, T] does not mark."""
    if padded is None:
        return error.mean()
    real = ~padded[..., None].expand_as(error)
    return (error * real).sum() / real.sum().clamp(min=1)


class MLPResNet(nn.Module):
    """LayerNorm, linear, ReLU, two residual blocks, LayerNorm, linear: both of OpenVLA-OFT's continuous heads.

    Parameter names are the released ones.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, blocks: int = 2) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(in_dim)
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList(MLPResNetBlock(hidden_dim) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        x = self.fc1(self.layer_norm1(x)).relu()
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class MLPResNetBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        return x + self.ffn(x)


class L1Network(nn.Module):
    """From the hidden states at a chunk's places to its actions; each step sees the states of its own D places.

    Args:
        dim: width of a hidden state.
        action_dim: D, action dimensions.
    """

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = MLPResNet(dim * action_dim, dim, action_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T * D, dim] -> normalised actions [B, T, D], which may leave [-1, 1]."""
        hidden = hidden.to(self.model.fc1.weight.dtype)
        return self.model(hidden.reshape(len(hidden), -1, self.action_dim * hidden.shape[2]))
