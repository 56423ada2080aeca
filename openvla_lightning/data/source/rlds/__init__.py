"""RLDS folders of tensorflow_datasets, read without TensorFlow."""

from openvla_lightning.data.source.rlds.source import RLDS

__all__ = ["RLDS"]
