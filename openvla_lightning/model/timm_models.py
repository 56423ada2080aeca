"""timm, without wandb, which it would import for its own training scripts alone: a tenth of every start here."""

import sys

_ABSENT = "wandb" not in sys.modules
if _ABSENT:
    sys.modules["wandb"] = None  # type: ignore[assignment]  # as where it is not installed
try:
    import timm
    from timm.layers import LayerScale
    from timm.models.vision_transformer import Block
finally:
    if _ABSENT:
        del sys.modules["wandb"]

__all__ = ["Block", "LayerScale", "timm"]
