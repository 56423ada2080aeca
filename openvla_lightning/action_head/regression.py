"""A chunk of actions in one forward pass, as numbers (OpenVLA-OFT, section IV: L1 regression)."""

from torch import Tensor, nn


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
