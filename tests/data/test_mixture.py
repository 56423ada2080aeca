"""The order is fair, exact, and a function of seed and sample number alone."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from golden_sets import LARGEST
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from openvla_lightning.data.curriculum import Change, intended, read_curriculum, stages
from openvla_lightning.data.loader import BatchNumbers
from openvla_lightning.data.mixture import BLOCK, GlobalOrder, HeldOutOrder, Stage, WindowedWalk, mixture_weights
from openvla_lightning.data.permutation import key, permute, uniform

ROOT = Path(__file__).parents[2]
sizes_and_shares = st.lists(st.tuples(st.integers(1, 3000), st.floats(0.01, 1)), min_size=1, max_size=5)


def order_of(parts: list[tuple[int, float]], seed: int) -> GlobalOrder:
    total = sum(share for _, share in parts)
    return GlobalOrder([size for size, _ in parts], [Stage(0, [share / total for _, share in parts])], seed)


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, np.uint64(seed))) == list(range(size))


def test_permute_is_as_good_as_a_shuffle() -> None:
    size = 20_000
    shuffled = permute(np.arange(size), size, key(1))
    assert abs(np.corrcoef(shuffled, np.arange(size))[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 4 / math.sqrt(size)
    # neighbours come from the same trajectory of 40 steps as rarely as in a uniform shuffle
    share = np.mean(shuffled[1:] // 40 == shuffled[:-1] // 40)
    expected = 39 / (size - 1)
    assert abs(share - expected) < 4 * math.sqrt(expected / size)
    assert np.mean(shuffled == permute(np.arange(size), size, key(2))) < 1e-3
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


@settings(max_examples=15)
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
    order = GlobalOrder([1000, 50, 7, 3], [Stage(0, shares.tolist())], 3)
    dataset, _ = order(np.arange(100_000))
    counts = np.bincount(dataset, minlength=4)
    assert order.served(100_000).tolist() == counts.tolist()
    assert ((counts - 100_000 * shares) ** 2 / (100_000 * shares)).sum() < 16.3  # chi-square, 3 degrees, p = 0.001
    # and no rhythm: neighbours are of the same dataset as often as independent draws would be
    assert abs(np.mean(dataset[1:] == dataset[:-1]) - (shares**2).sum()) < 0.01


def test_neighbours_are_of_one_trajectory_as_rarely_as_in_a_uniform_shuffle() -> None:
    sizes, length = np.array([20_000, 8_000, 4_000]), 200
    order = GlobalOrder(sizes.tolist(), [Stage(0, (sizes / sizes.sum()).tolist())], 11)
    dataset, position = order(np.arange(sizes.sum()))
    trajectory = position // length + 1000 * dataset
    expected = (length - 1) / (sizes.sum() - 1)
    for distance in (1, 2, 16):  # neighbours in time, in a batch, and of one rank of many
        share = np.mean(trajectory[distance:] == trajectory[:-distance])
        assert abs(share - expected) < 4 * math.sqrt(expected / sizes.sum())


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
    assert list(shares.values()) == pytest.approx([0.7142857142857143, 0.21428571428571427, 0.07142857142857142, 0.0])
    assert mixture_weights({"a": 3.0, "b": 1.0}, {"a": 400, "b": 120}, balance=False) == {"a": 0.75, "b": 0.25}


@LARGEST
@pytest.mark.parametrize(
    "name",
    ["bridge", "bridge_rt_1", "rtx", "oxe_magic_soup", "oxe_magic_soup_plus", "oxe_magic_soup_plus_minus"],
)
def test_the_released_mixtures_on_datasets_of_the_published_sizes(each_golden: Path, name: str) -> None:
    published = json.loads((each_golden / "data/bridge/mixture_weights_published_sizes.json").read_text())
    released = published["mixtures"][name]
    sizes = {dataset: facts["num_transitions"] for dataset, facts in published["sizes"].items()}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        weights = OmegaConf.to_container(compose("train", ["data=oxe", f"data/mix={name}"]).data.mix)
    shares = mixture_weights(weights, sizes)
    assert shares == pytest.approx(dict(zip(released["names"], released["sample_weights"], strict=True)))


stage_lists = st.lists(
    st.tuples(st.integers(1, 2 * BLOCK), st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(any)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=20)
@given(stage_lists, st.integers(0, 99))
def test_each_stage_has_its_shares_and_goes_on_where_the_last_one_stopped(parts, seed: int) -> None:
    starts = [0, *np.cumsum([length for length, _ in parts]).tolist()]
    found = [
        Stage(start, [share / sum(shares) for share in shares])
        for start, (_, shares) in zip(starts[:-1], parts, strict=True)
    ]
    sizes = [700, 90, 1]
    order = GlobalOrder(sizes, found, seed)
    dataset, position = order(np.arange(starts[-1]))
    for stage, (first, last) in zip(found, pairwise(starts), strict=True):
        counts = np.bincount(dataset[first:last], minlength=3)
        assert not counts[np.array(stage.shares) == 0].any()
        if (last - first) % BLOCK == 0:
            assert np.abs(counts - np.array(stage.shares) * (last - first)).max() <= 1 + (last - first) / BLOCK
    for i, size in enumerate(sizes):
        walk = position[dataset == i]
        for start, end in pairwise(range(0, len(walk) + 1, size)):
            assert sorted(walk[start:end]) == list(range(size))
    late = GlobalOrder(sizes, found, seed)  # asked for a late place first, as after a restart
    place = starts[-1] - 1
    assert [x.item() for x in late(np.array([place]))] == [dataset[place], position[place]]
    for n in (0, 1, starts[1], starts[-1]):
        assert order.served(n).tolist() == np.bincount(dataset[:n], minlength=3).tolist()
        assert sum(intended(found, n)) == pytest.approx(n)
    lengths = np.diff(starts)
    by_hand = sum(np.array(stage.shares) * length for stage, length in zip(found, lengths, strict=True))
    assert intended(found, starts[-1]) == pytest.approx(by_hand)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 100)), min_size=1, max_size=12), st.integers(1, 250))
def test_a_windowed_walk_is_a_permutation_that_reads_few_shards_at_a_time(shards, budget: int) -> None:
    steps, sizes = (np.array(part) for part in zip(*shards, strict=True))
    total = int(steps.sum())
    bounds = np.cumsum([0, *steps])
    walk = WindowedWalk(bounds, sizes, budget)
    for epoch in (key(1), key(2)):
        positions = walk(np.arange(total), np.full(total, epoch))
        assert sorted(positions) == list(range(total))
        shard = np.searchsorted(bounds, positions, side="right") - 1
        first_use = {f: int(np.flatnonzero(shard == f)[0]) for f in set(shard.tolist())}
        last_use = {f: int(np.flatnonzero(shard == f)[-1]) for f in set(shard.tolist())}
        for place in range(total):
            open_now = [f for f in first_use if first_use[f] <= place <= last_use[f]]
            assert len(open_now) == 1 or sizes[open_now].sum() <= budget


def test_a_windowed_dataset_beside_a_uniform_one() -> None:
    walk = WindowedWalk(np.array([0, 100, 150, 300]), np.array([10, 10, 10]), 20)
    order = GlobalOrder([300, 500], [Stage(0, [0.5, 0.5])], 1, {0: walk})
    dataset, position = order(np.arange(2000))
    for i, size in enumerate((300, 500)):
        assert sorted(position[dataset == i][:size]) == list(range(size))


def test_a_curriculum_in_shares_and_in_steps(caplog: pytest.LogCaptureFixture) -> None:
    mix, sizes = {"a": 1.0, "b": 0.5}, {"a": 100, "b": 200, "c": 50}
    changes = read_curriculum(mix, [{"after": 0.5, "mix": {"b": 0.0}}, {"after": 0.75, "mix": {"c": 2}}])
    found = stages(mix, changes, sizes, balance=True, max_steps=1000, global_batch_size=8)
    assert [stage.start for stage in found] == [0, 4000, 6000]
    assert [stage.shares for stage in found] == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    assert Change(30, {}).step(-1) == 30
    assert not caplog.text
    late = read_curriculum(mix, [{"after": 1000, "mix": {"b": 0.0}}])
    stages(mix, late, sizes, balance=True, max_steps=1000, global_batch_size=8)
    assert "max_steps=1000 ends before the change at step 1000" in caplog.text
    with pytest.raises(ValueError, match=r"share of trainer\.max_steps, which is -1"):
        stages(mix, changes, sizes, balance=True, max_steps=-1, global_batch_size=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"from": 10, "mix": {}}], "a change is"),
        ([{"after": 0, "mix": {"a": 1}}], "after=0 is neither"),
        ([{"after": True, "mix": {"a": 1}}], "after=True is neither"),
        ([{"after": 2.5, "mix": {"a": 1}}], r"after=2\.5 is neither"),
        ([{"after": 0.5, "mix": {"a": -1}}], "a: -1"),
        ([{"after": 0.5, "mix": {"a": 0}}], "mixture is empty"),
        ([{"after": 0.5, "mix": {"b": 1}}, {"after": 0.5, "mix": {"b": 2}}], "must follow each other"),
        ([{"after": 0.5, "mix": {"b": 1}}, {"after": 50, "mix": {"b": 2}}], "every one in optimiser steps"),
    ],
)
def test_impossible_curricula_are_errors(changes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_curriculum({"a": 1.0}, changes)


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
