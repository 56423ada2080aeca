"""The order is fair, exact, and a function of seed and sample number alone."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvla_lightning.data.datamodule import BatchNumbers
from openvla_lightning.data.mixture import BLOCK, GlobalOrder, HeldOutOrder, key, mixture_weights, permute, uniform

sizes_and_shares = st.lists(st.tuples(st.integers(1, 3000), st.floats(0.01, 1)), min_size=1, max_size=5)


def order_of(parts: list[tuple[int, float]], seed: int) -> GlobalOrder:
    total = sum(share for _, share in parts)
    return GlobalOrder([size for size, _ in parts], [share / total for _, share in parts], seed)


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, np.array([seed], np.uint64))) == list(range(size))


def test_permute_is_as_good_as_a_shuffle() -> None:
    size = 20_000
    shuffled = permute(np.arange(size), size, np.array([key(1)]))
    assert abs(np.corrcoef(shuffled, np.arange(size))[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 4 / math.sqrt(size)
    # neighbours come from the same trajectory of 40 steps as rarely as in a uniform shuffle
    share = np.mean(shuffled[1:] // 40 == shuffled[:-1] // 40)
    expected = 39 / (size - 1)
    assert abs(share - expected) < 4 * math.sqrt(expected / size)
    assert np.mean(shuffled == permute(np.arange(size), size, np.array([key(2)]))) < 1e-3
    assert 0.49 < uniform(np.arange(size, dtype=np.uint64)).mean() < 0.51


@settings(max_examples=30)
@given(sizes_and_shares, st.integers(0, 99), st.integers(0, 3 * BLOCK), st.data())
def test_order_depends_on_nothing_but_seed_and_number(parts, seed: int, first: int, data: st.DataObject) -> None:
    numbers = first + np.arange(300)
    dataset, position = order_of(parts, seed)(numbers)
    picked = np.array(data.draw(st.lists(st.integers(0, 299), min_size=1, max_size=20)))
    again = order_of(parts, seed)
    again(np.array([5 * BLOCK]))  # whatever was asked before
    np.testing.assert_array_equal(again(numbers[picked])[0], dataset[picked])
    np.testing.assert_array_equal(again(numbers[picked])[1], position[picked])
    assert all(0 <= p < parts[d][0] for d, p in zip(dataset, position, strict=True))


@settings(max_examples=15, deadline=None)
@given(sizes_and_shares, st.integers(0, 99))
def test_each_dataset_is_walked_through_once_before_any_step_returns(parts, seed: int) -> None:
    dataset, position = order_of(parts, seed)(np.arange(3 * BLOCK))
    for i, (size, _) in enumerate(parts):
        walk = position[dataset == i]
        for start, end in pairwise(range(0, len(walk) + 1, size)):
            assert sorted(walk[start:end]) == list(range(size))
        if len(walk) >= 2 * size and size > 20:
            assert list(walk[:size]) != list(walk[size : 2 * size])


def test_shares_are_those_of_the_mixture() -> None:
    shares = np.array([0.6, 0.3, 0.0999, 0.0001])
    dataset, _ = GlobalOrder([1000, 50, 7, 3], shares.tolist(), 3)(np.arange(100_000))
    counts = np.bincount(dataset, minlength=4)
    assert ((counts - 100_000 * shares) ** 2 / (100_000 * shares)).sum() < 16.3  # chi-square, 3 degrees, p = 0.001
    # and no rhythm: neighbours are of the same dataset as often as independent draws would be
    assert abs(np.mean(dataset[1:] == dataset[:-1]) - (shares**2).sum()) < 0.01


def test_held_out_order_is_everything_once_and_any_prefix_is_mixed() -> None:
    dataset, position = HeldOutOrder([50, 150], 1)(np.arange(200))
    assert sorted(zip(dataset, position, strict=True)) == [(0, p) for p in range(50)] + [(1, p) for p in range(150)]
    assert 5 <= (dataset[:60] == 0).sum() <= 27


@given(st.integers(1, 3), st.integers(1, 4), st.integers(24, 200), st.integers(0, 500))
def test_processes_share_out_every_sample_once(world: int, per_process: int, samples: int, served: int) -> None:
    size = world * per_process
    start = served - served % size
    passes = [list(BatchNumbers(lambda: start, size, samples, world, rank)) for rank in range(world)]
    assert len({len(p) for p in passes}) == 1
    numbers = sorted(n for p in passes for batch in p for n in batch)
    assert numbers == list(range(start, start + len(numbers)))
    batches = max(1, samples // size)
    assert len(passes[0]) == batches - start // size % batches
    held_out = [
        n for rank in range(world) for b in BatchNumbers(lambda: 0, size, samples, world, rank, True) for n in b
    ]
    assert sorted(held_out) == list(range(samples - samples % world))


def test_released_weights() -> None:
    shares = mixture_weights({"a": 1.0, "b": 1.0, "c": 1.0, "off": 0.0}, {"a": 400, "b": 120, "c": 40, "off": 9})
    assert list(shares.values()) == pytest.approx([0.7142857142857143, 0.21428571428571427, 0.07142857142857142])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "mixture is empty"),
        ({"a": 0.0}, "mixture is empty"),
        ({"a": -1.0}, "a: -1.0"),
        ({"a": float("nan")}, "a: nan"),
        ({"a": "1"}, "a: '1'"),
        ({"a": 1.0, "none": 1.0}, "nothing to train on in none"),
    ],
)
def test_impossible_mixtures_are_errors(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_weights(weights, {"a": 10, "none": 0})
