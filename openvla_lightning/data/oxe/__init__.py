"""The datasets of Open X-Embodiment and their standardisation."""

from openvla_lightning.data.oxe.registry import (
    DatasetSpec,
    UnregisteredDatasetError,
    check_names,
    dataset_spec,
    describe,
    known_datasets,
    standardise,
)

__all__ = [
    "DatasetSpec",
    "UnregisteredDatasetError",
    "check_names",
    "dataset_spec",
    "describe",
    "known_datasets",
    "standardise",
]
