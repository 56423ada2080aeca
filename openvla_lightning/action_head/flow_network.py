"""A small transformer over action tokens that attends to the backbone's hidden states, for flow matching."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from openvla_lightning.action_head.flow_matching import time_embedding

KeysValues = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [B, heads, S, head_dim] of the context, for each block."""


class FlowNetwork(nn.Module):
    """Predicts the velocity of noisy actions from the backbone's hidden states, the context.

    Each block has self-attention over the action tokens, cross-attention to the context, and an MLP; the time
    scales, shifts and gates each of the three (DiT, Peebles and Xie 2023). Gates and the last layer start at zero, so
    an untrained network predicts velocity zero. The context's keys and values do not depend on time: `read` computes
    them once for all Euler steps.

    Args:
        context_dim: width of the backbone's hidden states.
        action_dim: D.
        horizon: T, actions in a chunk.
        width, depth, heads: of the transformer.
        proprio_dim: P, numbers of the robot's state, which become one extra token; 0: none.
    """

    def __init__(
        self,
        context_dim: int,
        action_dim: int,
        horizon: int,
        width: int = 512,
        depth: int = 8,
        heads: int = 8,
        proprio_dim: int = 0,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"width={width} must be even and a multiple of heads={heads}")
        self.horizon, self.action_dim = horizon, action_dim
        self.action_in = nn.Linear(action_dim, width)
        self.state_in = nn.Linear(proprio_dim, width) if proprio_dim else None
        self.positions = nn.Parameter(torch.randn(horizon + (proprio_dim > 0), width) * 0.02)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.context_norm = nn.LayerNorm(context_dim)
        self.context_in = nn.Linear(context_dim, width)
        blocks = [_Block(width, heads) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.action_out = nn.Linear(width, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in blocks:
            nn.init.zeros_(block.modulate.weight)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.action_out.weight)

    def read(self, context: Tensor) -> KeysValues:
        """Keys and values of all blocks for hidden states [B, S, context_dim]."""
        return self._read(context)

    def _read(self, context: Tensor) -> KeysValues:
        # `forward` must not call `read`: with sharded weights, FSDP would free them when `read` returns.
        context = self.context_in(self.context_norm(context))
        return [block.read(context) for block in self.blocks]  # type: ignore[operator]

    def forward(
        self,
        moving: Tensor,
        time: Tensor,
        context: Tensor | KeysValues,
        mask: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, T, D].

        Args:
            moving: noisy actions [B, T, D].
            time: [B].
            context: hidden states [B, S, context_dim], or the result of `read`.
            mask: bool [B, S], False where the context is padding; None: no padding.
            proprio: [B, P], if the network was built for it.
        """
        tokens = self.action_in(moving)
        if self.state_in is not None:
            if proprio is None:
                raise ValueError("this head was built for the robot's state, and the observation has no proprio")
            tokens = torch.cat([self.state_in(proprio.to(moving.dtype))[:, None], tokens], dim=1)
        tokens = tokens + self.positions
        condition = self.time_in(time_embedding(time, tokens.shape[-1]).to(tokens.dtype))
        where = None if mask is None else mask[:, None, None]
        keys_values = self._read(context) if isinstance(context, Tensor) else context
        for block, kept in zip(self.blocks, keys_values, strict=True):
            tokens = block(tokens, condition, kept, where)
        scale, shift = self.modulate(condition)[:, None].chunk(2, dim=-1)
        return self.action_out(self.norm(tokens[:, -self.horizon :]) * (1 + scale) + shift)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 9 * width)
        self.self_in = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.cross_query = nn.Linear(width, width)
        self.cross_in = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cross_in(context).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(
        self, tokens: Tensor, condition: Tensor, keys_values: tuple[Tensor, Tensor], where: Tensor | None
    ) -> Tensor:
        scales = self.modulate(condition)[:, None].chunk(9, dim=-1)

        def modulated(place: int) -> Tensor:
            return self.norm(tokens) * (1 + scales[3 * place]) + scales[3 * place + 1]

        queries, keys, values = map(self._split, self.self_in(modulated(0)).chunk(3, dim=-1))
        tokens = tokens + scales[2] * self.self_out(self._join(scaled_dot_product_attention(queries, keys, values)))
        queries = self._split(self.cross_query(modulated(1)))
        looked = self._join(scaled_dot_product_attention(queries, *keys_values, attn_mask=where))
        tokens = tokens + scales[5] * self.cross_out(looked)
        return tokens + scales[8] * self.mlp(modulated(2))

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _join(self, values: Tensor) -> Tensor:
        return values.transpose(1, 2).flatten(2)
