"""Which datasets are known, and how each becomes 7-dim end-effector actions with one instruction."""

from collections.abc import Iterable
from difflib import get_close_matches

from openvla_lightning.data.oxe import datasets  # registers them
from openvla_lightning.data.oxe.registry import REGISTERED, cut
from openvla_lightning.data.oxe.spec import DatasetSpec, Trajectory

__all__ = ["UnregisteredDatasetError", "check_names", "dataset_spec", "datasets", "known_datasets", "standardise"]


class UnregisteredDatasetError(ValueError):
    """A mixture names a dataset that nobody has described."""


def known_datasets() -> list[str]:
    """Names that a mixture may use without describing them."""
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
    """Return what is known of dataset `name`.

    Raises:
        UnregisteredDatasetError: nothing is; the message names the nearest known ones.
    """
    check_names([name])
    return REGISTERED[name]


def standardise(dataset_name: str, trajectory: Trajectory) -> Trajectory:
    """Bring a raw trajectory of a known dataset into the common form, as released.

    Args:
        dataset_name: a known dataset.
        trajectory: nested dicts of NumPy arrays [T, ...] as stored, strings as bytes, images encoded or not.

    Returns:
        A new trajectory: `action` [T', 7] (six changes of the end effector, then the gripper with 1 = open),
        `language_instruction` [T'], `observation`, and the other keys cut to the same T'.

    Raises:
        UnregisteredDatasetError: nobody described it.
    """
    spec = dataset_spec(dataset_name)
    standardised = spec.transform(trajectory)
    return cut(standardised, slice(1, None)) if spec.drop_first else standardised
