"""The datasets of Open X-Embodiment and their standardisation."""

from openvla_lightning.data.oxe.catalogue import (
    UnregisteredDatasetError,
    check_names,
    dataset_spec,
    known_datasets,
    standardise,
)
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.oxe.spec import DatasetSpec

__all__ = [
    "DatasetSpec",
    "UnregisteredDatasetError",
    "check_names",
    "dataset_spec",
    "describe",
    "known_datasets",
    "standardise",
]
