"""What the model predicts actions with: a head writes the targets, owns loss and metrics, and decodes the answer."""

from openvla_lightning.action_head.base import Acting, ActionHead, Decoder
from openvla_lightning.action_head.diffusion import DiffusionHead
from openvla_lightning.action_head.regression import L1Head
from openvla_lightning.action_head.text import TextHead
from openvla_lightning.action_head.tokens import TokenHead

__all__ = ["Acting", "ActionHead", "Decoder", "DiffusionHead", "L1Head", "TextHead", "TokenHead"]
