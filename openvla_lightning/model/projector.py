"""From patch features to the LLM's embedding space."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Maps patch features [B, P, in_dim] to visual tokens [B, P, out_dim]."""

    kind: ClassVar[str]

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` reads back; the dimensions come from the neighbours."""
        return {"kind": self.kind}

    @staticmethod
    def from_config(config: dict[str, Any], in_dim: int, out_dim: int) -> "Projector":
        """Rebuild the projector of `config["kind"]`.

        Raises:
            ValueError: for an unknown kind.
        """
        kinds: dict[str, type[Projector]] = {c.kind: c for c in (Linear, MLP, FusedMLP)}
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
