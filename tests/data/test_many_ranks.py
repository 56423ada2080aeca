"""512 processes share one order: together they are given what one process alone would be, and nothing twice."""

import numpy as np

from openvla_lightning.data.loader import BatchNumbers
from openvla_lightning.data.mixture import GlobalOrder, Stage

WORLD, BATCH = 512, 2048
SIZES = [40_000, 250_000, 3_000, 7_100]
STAGES = [Stage(0, [0.3, 0.5, 0.1, 0.1]), Stage(40 * BATCH, [0.4, 0.6, 0.0, 0.0])]


def order() -> GlobalOrder:
    """As every process makes it for itself."""
    return GlobalOrder(SIZES, STAGES, seed=7)


def test_512_ranks_share_every_batch_without_a_gap_or_a_repetition() -> None:
    start, batches = 38 * BATCH, 6  # resumed, shortly before the mixture changes
    ranks = [list(BatchNumbers(lambda: start, BATCH, 100 * BATCH, WORLD, rank))[:batches] for rank in range(WORLD)]
    for batch in range(batches):
        numbers = np.array([rank[batch] for rank in ranks])
        assert numbers.shape == (WORLD, BATCH // WORLD)
        first = start + batch * BATCH
        assert np.array_equal(np.sort(numbers, axis=None), np.arange(first, first + BATCH))


def test_512_ranks_are_given_what_one_process_would_be() -> None:
    numbers = np.arange(38 * BATCH, 44 * BATCH)
    alone = np.stack(order()(numbers), axis=1)
    shared = np.empty_like(alone)
    for rank in range(0, WORLD, 37):  # each with an order of its own, that nobody told anything
        mine = numbers[rank::WORLD]
        shared[rank::WORLD] = np.stack(order()(mine), axis=1)
        assert np.array_equal(shared[rank::WORLD], alone[rank::WORLD])
    served = order().served(44 * BATCH) - order().served(38 * BATCH)
    assert np.array_equal(served, np.bincount(alone[:, 0], minlength=len(SIZES)))
