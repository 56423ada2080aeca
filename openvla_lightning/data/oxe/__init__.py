"""The datasets of Open X-Embodiment and their standardisation."""

from openvla_lightning.data.oxe.registry import (
    DatasetSpec,
    UnknownDatasetError,
    check_names,
    dataset_spec,
    describe,
    known_datasets,
    standardise,
)

__all__ = [
    "DatasetSpec",
    "UnknownDatasetError",
    "check_names",
    "dataset_spec",
    "describe",
    "known_datasets",
    "standardise",
]
