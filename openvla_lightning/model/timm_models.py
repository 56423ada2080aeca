"""timm without wandb, which timm imports only for its training scripts; this saves a tenth of every start."""

import sys

_ABSENT = "wandb" not in sys.modules
if _ABSENT:
    sys.modules["wandb"] = None  # type: ignore[assignment]  # as if it were not installed
try:
    import timm
    from timm.models.vision_transformer import Block, LayerScale  # before 1.0.21 not the one of timm.layers
finally:
    if _ABSENT:
        del sys.modules["wandb"]

__all__ = ["Block", "LayerScale", "timm"]
