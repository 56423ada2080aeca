"""Killed at any moment and started again, training is given the batches that would have come."""

import itertools
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import resumable
import toy_rlds

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.loader import BatchNumbers
from openvla_lightning.data.source.rlds import RLDS

STEPS, KILLS, CHANGE = 240, 20, 30
CONTEXT = multiprocessing.get_context("fork")  # a new interpreter would import for ten seconds, twenty times


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three indexed datasets."""
    folder = tmp_path_factory.mktemp("three")
    for episodes, name in zip((12, 7, 9), resumable.NAMES, strict=True):
        toy_rlds.write(folder / name / "1.0.0", {"train": episodes, "val": 1})
    return folder


def run(root: Path, folder: Path, pause: float) -> multiprocessing.process.BaseProcess:
    folder.mkdir(exist_ok=True)
    process = CONTEXT.Process(target=resumable.main, args=(root, folder, STEPS, pause))
    process.start()
    return process


def diary(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "diary.txt").read_text().splitlines() if (folder / "diary.txt").exists() else []
    return [(int(step), rest) for step, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.slow
def test_twenty_kills_change_nothing(root: Path, tmp_path: Path) -> None:
    whole = run(root, tmp_path / "whole", 0)
    whole.join(120)
    expected = dict(diary(tmp_path / "whole"))
    assert sorted(expected) == list(range(STEPS))
    names = [{*line.split()[1:]} for line in expected.values()]
    assert set().union(*names[:CHANGE]) == {"one", "two"}
    assert set().union(*names[CHANGE:]) == {"one", "three"}

    rng = np.random.default_rng(3)
    folder, pause = tmp_path / "killed", 0.03
    resumed_in_the_middle, workers = 0, []
    for kills in itertools.count():
        before = len(diary(folder))
        # a busy machine gets less far between two kills
        if kills >= KILLS and max(step for step, _ in diary(folder)) > CHANGE:
            break
        process = run(root, folder, pause)
        deadline = time.monotonic() + 60
        while len(diary(folder)) == before and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 10 * pause))
        workers += [worker.pid for worker in psutil.Process(process.pid).children(recursive=True)]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        resumed_in_the_middle += 0 < diary(folder)[before][0] < STEPS
    process = run(root, folder, 0)
    process.join(120)
    assert process.exitcode == 0
    assert len(workers) >= 20
    time.sleep(0.5)
    assert not [worker for worker in workers if running(worker)], "workers outlive a killed training"
    found = diary(folder)
    assert resumed_in_the_middle >= KILLS // 2  # before the first checkpoint there is nothing to resume
    assert {step for step, _ in found} == set(range(STEPS))
    assert all(line == expected[step] for step, line in found)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def datamodule(root: Path) -> VLADataModule:
    data = VLADataModule(
        partial(RLDS, root),
        mix=dict.fromkeys(resumable.NAMES, 1.0),
        datasets=dict.fromkeys(resumable.NAMES, toy_rlds.SPEC),
        collate=list,
        image_size=toy_rlds.SIZE,
        global_batch_size=6,
        num_workers=0,
    )
    data.prepare_data()
    data.setup()
    data.train_dataloader()
    return data


@pytest.mark.parametrize("worlds", [(1,), (2,), (3,), (2, 3, 1)])
def test_any_number_of_ranks_serves_each_step_once_in_the_same_order(root: Path, worlds: tuple[int, ...]) -> None:
    data = datamodule(root)
    each = {name: len(steps) for name, steps in data.train.items()}
    longest = max(size / share for size, share in zip(each.values(), data.shares.values(), strict=True))
    total = int(longest) // 6 * 6
    order: list[int] = []
    for world in worlds:  # each goes on where the one before was stopped
        start, share = len(order), total // len(worlds) // 6 * 6
        ranks = [
            list(itertools.islice(BatchNumbers(lambda: start, 6, 10 * total, world, rank), share // 6))  # noqa: B023
            for rank in range(world)
        ]
        for batches in zip(*ranks, strict=True):
            order += [number for numbers in zip(*batches, strict=True) for number in numbers]
    assert order == list(range(len(order)))
    dataset, position = data.order(np.array(order))
    for i, size in enumerate(each.values()):
        walk = position[dataset == i].tolist()
        assert len(set(walk[:size])) == len(walk[:size])
