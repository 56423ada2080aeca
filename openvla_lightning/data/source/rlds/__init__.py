"""RLDS folders, as tensorflow_datasets writes them, read without TensorFlow."""

from openvla_lightning.data.source.rlds.source import RLDS

__all__ = ["RLDS"]
