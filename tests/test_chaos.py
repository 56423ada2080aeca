"""A training that is killed, told to end, robbed of disk, files or clock: nothing is lost, nothing wrong in silence.

OPENVLA_CHAOS=100 plays that many rounds instead of one of each kind.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from openvla_lightning.callbacks.save_checkpoints import SAME_CTRL_C
from openvla_lightning.checkpoint.newest import newest_checkpoint

sys.path.append(str(Path(__file__).parent / "data"))
import chaos_world
from chaos_world import EVERY, STEPS, calm, clock_set_back, full_disk, stale_handles, started

KINDS = ("SIGKILL", "SIGTERM", "Ctrl-C", "full", "deleted", "replaced", "stale", "clock")
ROUNDS = int(os.environ.get("OPENVLA_CHAOS", len(KINDS)))
PLAYED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str], torch.Tensor]:
    """The data, what an undisturbed training is given at each step, and what it learns."""
    root = tmp_path_factory.mktemp("calm")
    data = chaos_world.write(root / "data")
    assert ended(started(data, root / "run", root / "log", calm, pause=0.0)) == 0, (root / "log").read_text()
    diary = noted(root / "run")
    assert sorted(diary) == [*range(STEPS)]
    return data, {step: said[0] for step, said in diary.items()}, learnt(root / "run")


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def noted(run: Path) -> dict[int, list[str]]:
    """Step -> what was noted of it, once for each time that it was made."""
    found: dict[int, list[str]] = {}
    for line in (run / "diary.txt").read_text().splitlines() if (run / "diary.txt").exists() else []:
        if len(parts := line.split(" ", 1)) == 2 and len(line.split()) == 3:
            found.setdefault(int(parts[0]), []).append(parts[1])
    return found


def learnt(run: Path) -> torch.Tensor:
    newest = newest_checkpoint(run)
    assert newest is not None
    content = torch.load(newest, weights_only=True)
    assert content["global_step"] == STEPS
    return content["state_dict"]["weight"]


def written(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none. Every one of them is whole."""
    for path in (run / "checkpoints").glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] == int(path.stem.removeprefix("step_"))
    newest = newest_checkpoint(run)
    return 0 if newest is None else int(newest.stem.removeprefix("step_"))


def files(data: Path) -> list[Path]:
    return sorted([*data.rglob("*.tfrecord*"), *data.rglob("*.parquet"), *data.rglob("*.mp4")])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_nothing_is_lost_and_nothing_wrong_in_silence(
    number: int, world: tuple[Path, dict[int, str], torch.Tensor], tmp_path: Path
) -> None:
    source, expected, weights = world
    rng, kind = random.Random(number), KINDS[number % len(KINDS)]
    data, run, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    shutil.copytree(source, data, copy_function=shutil.copy2)
    begin = partial(started, data, run, log, workers=rng.choice([0, 0, 1]))
    try:
        DISTURBANCES[kind](rng, data, run, log, begin)
        for _ in range(3):  # and then in peace
            if ended(begin(calm)) == 0:
                break
        else:
            pytest.fail("it does not go on")
        diary = noted(run)
        assert sorted(diary) == [*range(STEPS)]
        wrong = {step: said for step, said in diary.items() if {*said} != {expected[step]}}
        assert not wrong, f"given something else than undisturbed: {wrong}"
        torch.testing.assert_close(learnt(run), weights, rtol=0, atol=0)
        assert not [*(run / "checkpoints").glob(".*")], "left behind"
    except BaseException as error:
        raise AssertionError(f"round {number}, {kind}: {error}\n{log.read_text()[-3000:]}") from error
    PLAYED[kind] += 1


def wait_until(rng: random.Random, run: Path, process: int) -> bool:
    """Sleep until some step; whether the process still lives."""
    step, patience = rng.randrange(1, STEPS - 3), time.monotonic() + 120
    while len(noted(run)) < step and time.monotonic() < patience:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.003)
    time.sleep(rng.uniform(0, 0.03))
    return True


def killed(rng: random.Random, data: Path, run: Path, log: Path, begin: Callable[..., int]) -> None:
    for _ in range(rng.randrange(1, 3)):
        process, before = begin(calm), written(run) if run.exists() else 0
        if wait_until(rng, run, process):
            os.kill(process, signal.SIGKILL)
            ended(process)
        assert written(run) >= before
        assert max(noted(run), default=0) - written(run) <= EVERY + 1, "more is lost than lies between checkpoints"


def told_to_end(
    how: signal.Signals, rng: random.Random, data: Path, run: Path, log: Path, begin: Callable[..., int]
) -> None:
    process = begin(calm, workers=1)
    assert wait_until(rng, run, process), log.read_text()
    for _ in range(2):  # to all processes of a job, the loader's workers too; torchrun passes on what a terminal sent
        os.killpg(process, how)
    assert ended(process) == 128 + how
    assert written(run) == max(noted(run)) + 1, "the last step is written, none is lost"
    assert "ckpt_path=last goes on" in log.read_text()


def no_room(rng: random.Random, data: Path, run: Path, log: Path, begin: Callable[..., int]) -> None:
    if rng.random() < 0.5:
        killed(rng, data, run, log, begin)
    before = written(run)
    assert ended(begin(full_disk)) == 1
    said = log.read_text()
    assert "cannot write the checkpoint" in said
    assert "The checkpoints before it are whole" in said
    assert written(run) == before


def robbed(how: str, rng: random.Random, data: Path, run: Path, log: Path, begin: Callable[..., int]) -> None:
    """A file goes, or another one takes its place, in the middle of training; later it is there again."""
    process = begin(calm)
    alive, target = wait_until(rng, run, process), rng.choice(files(data))
    aside = data.parent / "aside"
    target.rename(aside)
    if how == "replaced":
        target.write_bytes(os.urandom(aside.stat().st_size))
    code = ended(process) if alive else 0
    if code:  # what was open stays readable, so that it may also have come to its end
        assert target.name in log.read_text(), "the file is not named"
    fails = ended(begin(calm)) if code else 0
    assert not code or fails or written(run) == STEPS, "it goes on without the file"
    aside.replace(target)


def stale(rng: random.Random, data: Path, run: Path, log: Path, begin: Callable[..., int]) -> None:
    assert ended(begin(partial(stale_handles, rng.randrange(1000)))) == 0, log.read_text()


def backwards(rng: random.Random, data: Path, run: Path, log: Path, begin: Callable[..., int]) -> None:
    process = begin(partial(clock_set_back, rng.randrange(1000)))
    if wait_until(rng, run, process):
        os.kill(process, signal.SIGKILL)
        ended(process)
    step = written(run)
    found = sorted((run / "checkpoints").glob("*.ckpt"))
    for age, path in enumerate(found):  # as if each had been written before the one before it
        os.utime(path, (1e9 - age, 1e9 - age))
    assert written(run) == step, "an older checkpoint is taken for the newest"


DISTURBANCES: dict[str, Callable[..., None]] = {
    "SIGKILL": killed,
    "SIGTERM": partial(told_to_end, signal.SIGTERM),
    "Ctrl-C": partial(told_to_end, signal.SIGINT),
    "full": no_room,
    "deleted": partial(robbed, "deleted"),
    "replaced": partial(robbed, "replaced"),
    "stale": stale,
    "clock": backwards,
}


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_step_that_takes_long(
    world: tuple[Path, dict[int, str], torch.Tensor], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process, began = started(world[0], run, log, calm, pause=300.0, workers=1), time.monotonic()
    while not noted(run):
        time.sleep(0.01)
    os.killpg(process, signal.SIGINT)
    while "again ends it at once" not in log.read_text():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.01)
    time.sleep(SAME_CTRL_C)
    os.killpg(process, signal.SIGINT)
    assert ended(process) == 1
    assert time.monotonic() - began < 200
    assert written(run) == 0


def test_every_kind_was_played() -> None:
    assert set(PLAYED) == set(KINDS[:ROUNDS])
    print(dict(PLAYED))
