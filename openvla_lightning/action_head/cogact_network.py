"""The diffusion transformer of CogACT (arXiv 2411.19650, section 3.3), under the parameter names of its checkpoints."""

import math

import torch
from torch import Tensor, nn

from openvla_lightning.model.timm_models import Block

FREQUENCIES = 256
"""Width of a timestep's sine and cosine embedding."""


class CogACTNetwork(nn.Module):
    """Predicts the noise in a chunk of actions from a hidden state of the language model, the cognition.

    The condition (timestep plus cognition) is one token before the action tokens. The blocks are plain pre-norm blocks
    without modulation. The last layer starts at zero, so an untrained network predicts no noise.

    Args:
        cognition_dim: width of the language model's hidden states (released: 4096).
        action_dim: D.
        horizon: T, actions in a chunk (released: 16).
        hidden, depth, heads: released: S 384, 6, 4; B 768, 12, 12; L 1024, 24, 16.
        drop: share of training samples whose cognition is replaced by a learnt vector, for guidance.
    """

    def __init__(
        self,
        cognition_dim: int,
        action_dim: int = 7,
        horizon: int = 16,
        hidden: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.horizon, self.action_dim, self.drop = horizon, action_dim, drop
        self.positional_embedding = nn.Parameter(torch.randn(horizon + 1, hidden) * hidden**-0.5)
        self.history_embedder = _Linear(action_dim, hidden)  # unused, but every released checkpoint has one
        self.x_embedder = _Linear(action_dim, hidden)
        self.t_embedder = _TimestepEmbedder(hidden)
        self.z_embedder = _CognitionEmbedder(cognition_dim, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, heads) for _ in range(depth))
        self.final_layer = _Linear(hidden, action_dim)
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self._initialise()

    def forward(self, noisy: Tensor, timestep: Tensor, cognition: Tensor, drop: Tensor | None = None) -> Tensor:
        """Predicted noise [B, T, D].

        Args:
            noisy: noisy actions [B, T, D].
            timestep: int64 [B].
            cognition: [B, 1, cognition_dim].
            drop: bool [B], which samples see the learnt vector instead; None: no sample.
        """
        condition = self.t_embedder(timestep)[:, None] + self.z_embedder(cognition, drop)
        tokens = torch.cat([condition, self.x_embedder(noisy)], dim=1) + self.positional_embedding
        for block in self.blocks:
            tokens = block(tokens)
        return self.final_layer(self.norm(tokens))[:, 1:]

    def guided(self, noisy: Tensor, timestep: Tensor, cognition: Tensor, scale: float = 1.5) -> Tensor:
        """Noise [B, T, D] with classifier-free guidance; arguments as in `forward`, `scale` 1 means no guidance."""
        if scale <= 1:
            return self(noisy, timestep, cognition)
        without = torch.arange(2 * len(noisy), device=noisy.device) >= len(noisy)
        both = self(noisy.repeat(2, 1, 1), timestep.repeat(2), cognition.repeat(2, 1, 1), without)
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _initialise(self) -> None:
        """As released: Xavier for blocks, narrow normals for embeddings, zero for the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in (self.x_embedder, self.history_embedder, self.z_embedder, self.t_embedder):
            for module in embedder.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.z_embedder.uncondition, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)


class _Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values)


class _CognitionEmbedder(nn.Module):
    def __init__(self, cognition_dim: int, hidden: int) -> None:
        super().__init__()
        self.uncondition = nn.Parameter(torch.empty(1, cognition_dim))
        self.linear = nn.Linear(cognition_dim, hidden)

    def forward(self, cognition: Tensor, drop: Tensor | None) -> Tensor:
        if drop is not None:
            cognition = torch.where(drop[:, None, None], self.uncondition.to(cognition.dtype), cognition)
        return self.linear(cognition)


class _TimestepEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timestep, FREQUENCIES).to(next(self.mlp.parameters()).dtype))


class _Block(Block):
    """timm's block with CogACT's settings: norms without parameters, and the tanh approximation of GELU."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, heads, mlp_ratio=4, qkv_bias=True, norm_layer=_plain_norm, act_layer=_tanh_gelu)  # type: ignore[arg-type]


def _plain_norm(dim: int, **_: object) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def _tanh_gelu() -> nn.GELU:
    return nn.GELU(approximate="tanh")


def timestep_embedding(timestep: Tensor, width: int, longest: float = 10000.0) -> Tensor:
    """Cosines, then sines, of timesteps [B], float32 [B, width]; frequencies fall from 1; an odd width adds a 0."""
    half = width // 2
    frequencies = torch.exp(-math.log(longest) * torch.arange(half, device=timestep.device).float() / half)
    angles = timestep[:, None].float() * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, width - 2 * half))
