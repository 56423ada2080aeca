"""The queue in front of the model: who is acted on together, who is sent away, who still gets an answer at the end."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from hydra import compose, initialize_config_dir

from openvla_lightning.config import CONF
from openvla_lightning.serve import server
from openvla_lightning.serve.batching import Batcher
from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.reading import Question
from openvla_lightning.types import Observation

SOON = 30.0


def question(number: int) -> Question:
    return Question(Observation({"primary": np.full((1, 1, 3), number, np.uint8)}, f"go to {number}"))


class Model:
    """Answers with what the picture and the words say, once it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, seen: Sequence[Observation], keys: Sequence[str | None]) -> np.ndarray:
        self.batches.append([int(one.images["primary"][0, 0, 0]) for one in seen])
        assert self.may.wait(SOON)
        assert [int(one.instruction.split()[-1]) for one in seen] == self.batches[-1]
        return np.array([[[number] * 7] for number in self.batches[-1]], np.float64)


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.may.set()


def ask(batcher: Batcher, number: int, patience: float = SOON) -> "Future[np.ndarray]":
    return batcher.submit(question(number), time.monotonic() + patience)


def busy(model: Model, **limits: int) -> tuple[Batcher, "Future[np.ndarray]"]:
    """A batcher whose model works on question 0, and the answer to that."""
    batcher = Batcher(model, **limits)
    first = ask(batcher, 0)
    while not model.batches:
        time.sleep(0.001)
    return batcher, first


def test_a_full_queue_sends_away_and_loses_nobody(model: Model) -> None:
    batcher, first = busy(model, max_queue=3)
    waiting = [first, *(ask(batcher, number) for number in (1, 2, 3))]
    assert batcher.waiting() == 3
    with pytest.raises(Refused) as refusal:
        ask(batcher, 4)
    assert (refusal.value.status, refusal.value.code) == (503, "queue_full")
    model.may.set()
    assert [future.result(SOON)[0, 0] for future in waiting] == [0, 1, 2, 3]
    assert model.batches == [[0], [1, 2, 3]]
    batcher.join()


def test_closing_answers_who_waits_and_refuses_who_comes(model: Model) -> None:
    batcher, first = busy(model, max_batch=2)
    waiting = [first, *(ask(batcher, number) for number in range(1, 6))]
    batcher.close()
    assert not batcher.alive
    with pytest.raises(Refused) as refusal:
        ask(batcher, 6)
    assert (refusal.value.status, refusal.value.code) == (503, "stopping")
    model.may.set()
    batcher.join()
    assert [future.result(0)[0, 6] for future in waiting] == [0, 1, 2, 3, 4, 5]
    assert model.batches == [[0], [1, 2], [3, 4], [5]]


def test_the_stale_are_never_acted_on(model: Model) -> None:
    batcher, _ = busy(model)
    late = ask(batcher, 1, patience=0.01)
    kept = ask(batcher, 2)
    time.sleep(0.02)
    model.may.set()
    assert kept.result(SOON)[0, 0] == 2
    with pytest.raises(Refused) as refusal:
        late.result(SOON)
    assert refusal.value.status == 504
    assert model.batches == [[0], [2]]
    batcher.join()


def test_one_bad_question_does_not_spoil_the_batch() -> None:
    started = threading.Event()

    def act(seen: Sequence[Observation], keys: Sequence[str | None]) -> np.ndarray:
        images = [one.images["primary"] for one in seen]
        assert started.wait(SOON)
        if "go to 2" in [one.instruction for one in seen]:
            raise ValueError("2 is nowhere")
        return np.array([[[image[0, 0, 0]] * 7] for image in images], np.float64)

    batcher = Batcher(act)
    futures = [ask(batcher, number) for number in range(4)]
    started.set()
    assert [futures[number].result(SOON)[0, 0] for number in (0, 1, 3)] == [0, 1, 3]
    with pytest.raises(Refused, match="2 is nowhere") as refusal:
        futures[2].result(SOON)
    assert refusal.value.status == 422
    batcher.join()


@pytest.mark.parametrize(
    ("host", "token", "said"), [("0.0.0.0", None, True), ("0.0.0.0", "x", False), ("127.0.0.1", None, False)]
)
def test_who_opens_the_policy_to_the_network_is_told(
    host: str, token: str | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(Exception):
        pass

    def load() -> None:
        raise Stop

    with pytest.raises(Stop):
        server.serve(load, host, token=token)  # type: ignore[arg-type]
    assert ("OPENVLA_LIGHTNING_TOKEN" in caplog.text) == said


def test_the_server_is_as_described_by_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENVLA_LIGHTNING_TOKEN", "secret")
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("serve", ["quantisation=int4", "server.port=0", f"ckpt_path={tmp_path}"])
    assert (cfg.server.host, cfg.server.port, cfg.server.token) == ("127.0.0.1", 0, "secret")
    assert cfg.policy.quantisation.bits == 4
    with pytest.raises(ValueError, match="max_batch=0"):
        server.serve(lambda: None, max_batch=0)  # type: ignore[arg-type, return-value]


def test_one_signal_that_comes_twice_does_not_stop_at_once_and_a_second_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = server.Server(uvicorn.Config("nothing:app"), None, stop_seconds=10)  # type: ignore[arg-type]
    for _ in range(2):  # `timeout` tells the process, and its group
        running.handle_exit(signal.SIGTERM, None)
    assert not running.force_exit
    later = time.monotonic() + 2
    monkeypatch.setattr(server.time, "monotonic", lambda: later)
    running.handle_exit(signal.SIGTERM, None)
    assert running.force_exit
