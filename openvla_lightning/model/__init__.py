"""The model: vision backbone, projector, language model, decoding, checkpoints."""

from openvla_lightning.model.vla import VLA, VLAOutput

__all__ = ["VLA", "VLAOutput"]
