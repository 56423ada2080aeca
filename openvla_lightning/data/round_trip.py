"""Demonstrated actions that a policy cannot reproduce, because normalisation and tokens lose them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.actions import ActionTokenizer, dimension_names
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.statistics import DatasetStatistics, Normalisation

LOOKED_AT = 100_000
"""Steps, spread over the dataset, from which medians and shares are computed."""
FEW_BINS = 64
"""A dimension that is not normalised must span this many of the 255 bins; fewer are too coarse."""
BINARY = 0.95
"""Share of values 0, 1 and -1 from which a dimension counts as a gripper that opens and closes."""


@dataclass(frozen=True)
class RoundTrip:
    """Result of converting a dataset's actions to tokens and back.

    Attributes:
        values: float64 [3, D], each dimension's smallest, middle and largest demonstrated value.
        back: float64 [3, D], a perfect policy's output for these values.
        bins: float64 [D], the width of a token's bin in the dimension's units.
        outside: sentences on dimensions that are not normalised and leave -1..1, so that training makes no sense.
        remarks: sentences on other values that change by more than a bin, without the ordinary clipping.
        clipped: names of dimensions whose extremes are clipped, as released.
    """

    values: NDArray[np.float64]
    back: NDArray[np.float64]
    bins: NDArray[np.float64]
    outside: tuple[str, ...]
    remarks: tuple[str, ...]
    clipped: tuple[str, ...]

    @property
    def lost(self) -> NDArray[np.bool_]:
        """bool [3, D]: which of the values change by more than a bin."""
        return np.abs(self.back - self.values) > self.bins * (1 + 1e-6) + 1e-9


def round_trip(
    action: NDArray[np.float32], statistics: DatasetStatistics, normalisation: Normalisation, spec: DatasetSpec
) -> RoundTrip:
    """Convert the smallest, middle and largest demonstrated value of every dimension to tokens and back.

    Args:
        action: float32 [N, D], the training actions, in the dataset's units.
        statistics: statistics that scale them.
        normalisation: how they are scaled.
        spec: the dataset's description.
    """
    tokenizer = ActionTokenizer()
    some = action[:: max(1, len(action) // LOOKED_AT)]
    numbers = statistics.action
    values = np.stack([numbers["min"], np.median(some, axis=0), numbers["max"]]).astype(np.float64)
    normalised = statistics.normalise(values, normalisation)
    back = statistics.unnormalise(tokenizer.decode(tokenizer.encode(normalised)), normalisation)
    ends = np.stack([np.full(values.shape[1], -1.0), np.full(values.shape[1], 1.0)])
    low, high = statistics.unnormalise(ends, normalisation)
    trip = RoundTrip(values, back, (high - low) / (tokenizer.num_bins - 1), (), (), ())
    outside, remarks, clipped = [], [], []
    for d, name in enumerate(dimension_names(values.shape[1])):
        column = some[:, d]
        binary = float(np.isin(column, (-1, 0, 1)).mean())
        if not statistics.mask[d] and np.abs(values[[0, 2], d]).max() > 1 + trip.bins[d] / 2:
            outside.append(f"{name} lies in {values[0, d]:.4g}..{values[2, d]:.4g}")
            continue
        said = list(_about(d, name, trip, statistics, binary, values.shape[1], spec))
        remarks += said
        if not said and trip.lost[:, d].any():
            clipped.append(name)
    return RoundTrip(values, back, trip.bins, tuple(outside), tuple(remarks), tuple(clipped))


def _about(
    d: int, name: str, trip: RoundTrip, statistics: DatasetStatistics, binary: float, dim: int, spec: DatasetSpec
) -> Iterator[str]:
    numbers, (low, _, high) = statistics.action, trip.values[:, d]
    lost = trip.lost[:, d]
    if low == high:
        if lost.any():
            yield f"{name} is always {low:.4g} and comes back as {trip.back[0, d]:.3g} (`mask: true` for it keeps it)"
        return
    if statistics.mask[d]:
        if numbers["q01"][d] == numbers["q99"][d] and lost.any():
            yield (
                f"{name} is {numbers['q01'][d]:.4g} in nearly all steps, so the policy always answers that, and its "
                f"other values ({low:.4g}..{high:.4g}) are lost"
            )
        elif lost[1]:
            yield f"{name}'s middle value {trip.values[1, d]:.4g} comes back as {trip.back[1, d]:.4g}"
        return
    if binary < BINARY:
        bins = (high - low) / trip.bins[d]
        if bins < FEW_BINS:
            yield f"{name} is not normalised and spans only {bins:.0f} of 255 bins ({low:.4g}..{high:.4g})"
        if spec.encoding is None and spec.mask is None and d == dim - 1:
            yield f"{name}, the last of {dim}, is taken for a gripper but is not binary (say `mask` and `absolute`)"


def said_of(name: str, trip: RoundTrip) -> str | None:
    """One line about a dataset with actions that a policy cannot reproduce; None if there is nothing unusual."""
    if not trip.remarks:
        return None
    return f"{name}: actions that a policy cannot give back as they were demonstrated: {'; '.join(trip.remarks)}"


def refusal(name: str, trip: RoundTrip) -> str | None:
    """Why a dataset cannot be trained on, with two solutions; None if it can be."""
    if not trip.outside:
        return None
    return (
        f"{name}: {'; '.join(trip.outside)}. It is not normalised, and a policy can only say -1..1 of such a "
        f"dimension: everything beyond would be taught as -1 or 1. Bring it into 0..1 in a `transform`, or let it "
        f"be normalised with `mask: [true, ...]` (data.datasets.{name}, docs/data.md)"
    )
