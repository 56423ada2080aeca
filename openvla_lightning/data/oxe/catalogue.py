"""The known datasets, and the conversion of each to 7-dim end-effector actions with one instruction."""

from collections.abc import Iterable
from difflib import get_close_matches

from openvla_lightning.data.oxe import datasets  # registers the datasets
from openvla_lightning.data.oxe.registry import REGISTERED, cut
from openvla_lightning.data.oxe.spec import DatasetSpec, Trajectory

__all__ = ["UnregisteredDatasetError", "check_names", "dataset_spec", "datasets", "known_datasets", "standardise"]


class UnregisteredDatasetError(ValueError):
    """A mixture names a dataset without a description."""


def known_datasets() -> list[str]:
    """Names of the datasets that a mixture may use without a description."""
    return sorted(REGISTERED)


def check_names(names: Iterable[str], described: Iterable[str] = ()) -> None:
    """Raise UnregisteredDatasetError for the names that are neither known nor in `described`."""
    known = {*REGISTERED, *described}
    problems = []
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=2)
            problems.append(f"{name!r}" + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""))
    if problems:
        raise UnregisteredDatasetError(
            f"unknown dataset in the mixture: {', '.join(problems)}. Known: {', '.join(sorted(known))}. "
            f"Describe your own under data.datasets (docs/data.md)."
        )


def dataset_spec(name: str) -> DatasetSpec:
    """Return the description of dataset `name`.

    Raises:
        UnregisteredDatasetError: there is none; the message names similar known datasets.
    """
    check_names([name])
    return REGISTERED[name]


def standardise(dataset_name: str, trajectory: Trajectory) -> Trajectory:
    """Convert a raw trajectory of a known dataset to the common form, as released.

    Args:
        dataset_name: a known dataset.
        trajectory: nested dicts of NumPy arrays [T, ...] as stored; strings are bytes, images may be encoded.

    Returns:
        A new trajectory: `action` [T', 7] (six changes of the end effector, then the gripper with 1 = open),
        `language_instruction` [T'], `observation`, and the other keys cut to the same T'.

    Raises:
        UnregisteredDatasetError: it has no description.
    """
    spec = dataset_spec(dataset_name)
    standardised = spec.transform(trajectory)
    return cut(standardised, slice(1, None)) if spec.drop_first else standardised
