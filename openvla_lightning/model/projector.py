"""Projectors from patch features to the LLM's embedding space."""

from collections.abc import Sized
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openvla_lightning import plugins


class Projector(nn.Module):
    """Maps patch features [B, P, in_dim] to visual tokens [B, P, out_dim]."""

    kind: ClassVar[str]

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim

    @property
    def config(self) -> dict[str, Any]:
        """Plain data for `from_config`; the dimensions come from vision backbone and language model."""
        built_in = type(self).__module__ == __name__
        return {"kind": self.kind if built_in else f"{type(self).__module__}.{type(self).__qualname__}"}

    @staticmethod
    def from_config(config: dict[str, Any], in_dim: int, out_dim: int) -> "Projector":
        """Rebuild the projector of `config["kind"]`: one of ours, or the dotted path of a plug-in's class.

        Raises:
            ValueError: for an unknown kind, or a package that is not declared.
        """
        if "." in str(config.get("kind")):
            return plugins.find(config["kind"])(in_dim, out_dim)
        kinds: dict[str, type[Projector]] = {c.kind: c for c in (Linear, MLP, FusedMLP, Perceiver)}
        if config.get("kind") not in kinds:
            raise ValueError(f"unknown projector kind {config.get('kind')!r}; known: {', '.join(kinds)}")
        return kinds[config["kind"]](in_dim, out_dim)


class Linear(Projector):
    """One linear layer."""

    kind = "linear"

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.fc1 = nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, P, in_dim] to [B, P, out_dim]."""
        return self.fc1(features)


class MLP(Projector):
    """Two linear layers with an exact GELU between, as released for a single vision tower."""

    kind = "mlp"

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, P, in_dim] to [B, P, out_dim]."""
        return self.fc2(nn.functional.gelu(self.fc1(features)))


class FusedMLP(Projector):
    """Three linear layers, the first four times as wide as its input, as released for DINOv2 + SigLIP."""

    kind = "fused_mlp"

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.fc1 = nn.Linear(in_dim, 4 * in_dim)
        self.fc2 = nn.Linear(4 * in_dim, out_dim)
        self.fc3 = nn.Linear(out_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, P, in_dim] to [B, P, out_dim]."""
        hidden: torch.Tensor = nn.functional.gelu(self.fc1(features))
        return self.fc3(nn.functional.gelu(self.fc2(hidden)))


class Perceiver(Projector):
    """A fixed number of learnt queries that attend to all patches: the resampler of IDEFICS and Flamingo.

    Six blocks of self-attention, cross-attention to the patches and an MLP, then a linear layer into the LLM. The
    output has 64 visual tokens for any number of patches.
    """

    kind = "perceiver"
    queries, depth, head_dim = 64, 6, 64

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        heads = max(1, in_dim // self.head_dim)
        if in_dim % heads:
            raise ValueError(f"a perceiver with heads of {self.head_dim} cannot divide patch features {in_dim} wide")
        self.latents = nn.Parameter(torch.randn(self.queries, in_dim) * in_dim**-0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(in_dim, heads, 4 * in_dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(self.depth)
        )
        self.norm, self.fc = nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Resample features [B, P, in_dim] to [B, 64, out_dim]."""
        latents = self.latents.to(features.dtype).expand(len(features), -1, -1)
        for block in self.blocks:
            latents = block(latents, features)
        return self.fc(self.norm(latents))


def released(in_dim: int, out_dim: int, towers: Sized) -> Projector:
    """The released projector: two linear layers for one vision tower, three for two."""
    return (MLP if len(towers) == 1 else FusedMLP)(in_dim, out_dim)
