"""Action heads: a head writes the targets, computes loss and metrics, and decodes actions."""

from openvla_lightning.action_head.base import Acting, ActionHead, Decoder
from openvla_lightning.action_head.diffusion import DiffusionHead
from openvla_lightning.action_head.regression import L1Head
from openvla_lightning.action_head.text import TextHead
from openvla_lightning.action_head.tokens import TokenHead

__all__ = ["Acting", "ActionHead", "Decoder", "DiffusionHead", "L1Head", "TextHead", "TokenHead"]
