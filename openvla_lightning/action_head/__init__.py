"""What the model predicts actions with: a head encodes the targets, owns loss and metrics, and decodes the answer."""

from collections.abc import Mapping
from typing import Any

from openvla_lightning.action_head.base import ActionHead
from openvla_lightning.action_head.diffusion import DiffusionHead
from openvla_lightning.action_head.regression import L1Head
from openvla_lightning.action_head.text import TextHead
from openvla_lightning.action_head.tokens import TokenHead

__all__ = ["ActionHead", "DiffusionHead", "L1Head", "TextHead", "TokenHead", "from_config"]


def from_config(config: Mapping[str, Any]) -> Any:
    """Rebuild a head from its `config`; one without a name is of tokens."""
    arguments = dict(config)
    heads = {kind.__name__: kind for kind in (L1Head, DiffusionHead, TextHead, TokenHead)}
    return heads[arguments.pop("name", "TokenHead")](**arguments)
