"""What the model predicts actions with: a head encodes the targets, owns loss and metrics, and decodes the answer."""

from openvla_lightning.action_head.base import ActionHead
from openvla_lightning.action_head.text import TextHead
from openvla_lightning.action_head.tokens import TokenHead

__all__ = ["ActionHead", "TextHead", "TokenHead"]
