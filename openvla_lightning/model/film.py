"""FiLM: the instruction scales and shifts the features of the vision towers (OpenVLA-OFT section V, "OFT+")."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from openvla_lightning.model.timm_models import Block

FilmPadding = Literal["released", "masked"]


def check_padding(padding: str) -> str:
    """Return `padding`, one of `FilmPadding`.

    Raises:
        ValueError: for another value.
    """
    if padding not in get_args(FilmPadding):
        raise ValueError(f"film={padding!r} is not known: choose {', '.join(get_args(FilmPadding))}, or null for none")
    return padding


class FiLMBlock(nn.Module):
    """A ViT block whose features are scaled and shifted between attention and MLP: x * (1 + gamma) + beta.

    Gamma and beta are linear functions of the mean language embedding, the same for all tokens of an image, class and
    register tokens included. Parameters keep the names of the block they come from; `scale` and `shift` are new.

    Args:
        block: timm's block, whose layers are reused.
        language_dim: width of a language embedding.
    """

    def __init__(self, block: Block, language_dim: int) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        norm: Any = block.norm1
        width, like = norm.normalized_shape[0], next(block.parameters())
        # torch's default random weights are as released; zeros would leave the tower unchanged at the start.
        self.scale = nn.Linear(language_dim, width, device=like.device, dtype=like.dtype)
        self.shift = nn.Linear(language_dim, width, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        """Tokens [B, N, D_tower] and mean language embeddings [B, dim] -> tokens [B, N, D_tower]."""
        block: Any = self
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        # Released files keep FiLM in float32 beside towers in bfloat16.
        condition = language.to(self.scale.weight.dtype)
        gamma, beta = (layer(condition)[:, None].to(x.dtype) for layer in (self.scale, self.shift))
        x = x * (1 + gamma) + beta
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def add_film(tower: nn.Module, language_dim: int) -> None:
    """Replace every block of a ViT, the last one included as released, in place.

    Raises:
        ValueError: for a tower that is no sequence of plain ViT blocks.
    """
    blocks = getattr(tower, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not all(type(block) is Block for block in blocks):
        kinds = sorted({type(b).__name__ for b in blocks}) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
        raise ValueError(f"film needs a tower of plain ViT blocks; {type(tower).__name__} has {kinds or 'none'}")
    tower.blocks = nn.ModuleList(FiLMBlock(block, language_dim) for block in blocks)  # type: ignore[arg-type]


def film_features(tower: Any, pixels: Tensor, layer: int, language: Tensor) -> Tensor:
    """Patch features [B, P, D_tower] of a tower with FiLM, read at block `layer`, counted from the end.

    timm's own loop over blocks passes only tokens to them.
    """
    x = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(pixels))))
    for block in tower.blocks[: len(tower.blocks) + 1 + layer]:
        x = block(x, language)
    return x[:, tower.num_prefix_tokens :]


def film_layers(vision_backbone: nn.Module) -> list[nn.Module]:
    """The linear layers that FiLM added to the towers, which learn in full with every strategy."""
    blocks = [module for module in vision_backbone.modules() if isinstance(module, FiLMBlock)]
    return [layer for block in blocks for layer in (block.scale, block.shift)]
