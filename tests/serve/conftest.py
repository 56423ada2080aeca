"""One server for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_world import Running, save_checkpoint, start

from openvla_lightning.policy import Policy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def policy(checkpoint: Path) -> Policy:
    return Policy.from_pretrained(checkpoint, device="cpu", tokenizer="tiny")


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    limits = ["server.deadline_ms=20000", "server.receive_seconds=2", "server.max_bytes=1000000"]
    running = start(checkpoint, log, *limits, "server.max_pixels=100000")
    yield running
    if running.process.is_alive():
        running.end()
