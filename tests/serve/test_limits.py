"""Limits are held against what was measured, and a port is tried before a policy is loaded."""

import socket
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from openvla_lightning import Policy
from openvla_lightning.config import CONF
from openvla_lightning.serve.__main__ import run
from openvla_lightning.serve.app import Service, build_app
from openvla_lightning.serve.server import beyond, check_port, serve, speed

USUAL = {"max_wait_ms": 0.0, "max_batch": 16, "max_queue": 256}


def test_a_deadline_below_one_action_is_said_with_one_that_is_not() -> None:
    (said,) = beyond(0.02, 0.3, deadline_ms=2, **USUAL)
    assert "server.deadline_ms=2 is less than the 20 ms that one action takes here" in said
    assert "server.deadline_ms=40 leaves time" in said
    (said,) = beyond(0.02, 1.3, deadline_ms=1000, **USUAL)
    assert "server.max_batch=16 takes 1300 ms, more than server.deadline_ms=1000" in said
    assert beyond(0.02, 0.3, deadline_ms=1000, **USUAL) == []


def test_a_policy_of_chunks_is_as_fast_as_its_chunks() -> None:
    assert speed(2.21, 1) == "2.2 actions a second for one robot"
    assert speed(2.21, 8) == "2.2 chunks of 8 actions a second for one robot"


@given(st.floats(1e-3, 20), st.floats(1, 30), st.floats(1, 5000), st.floats(0, 100))
def test_what_is_proposed_can_be_kept(latency: float, factor: float, deadline: float, wait: float) -> None:
    limits = {"max_wait_ms": wait, "max_batch": 1, "max_queue": 1}
    for said in beyond(latency, latency * factor, deadline, **limits):
        proposed = float(said.partition("server.deadline_ms=")[2].rpartition("server.deadline_ms=")[2].split()[0])
        assert beyond(latency, latency * factor, proposed, **limits) == []


def test_a_taken_port_is_found_before_the_policy_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"server\.port={port}: .*in use.*server\.port=\.\.\."):
            serve(lambda: pytest.fail("it was loaded"), port=port)
    check_port("127.0.0.1", 0)
    for number in (-1, 65536):
        with pytest.raises(ValueError, match=rf"server\.port={number}: .*0-65535.*server\.port=\.\.\."):
            check_port("127.0.0.1", number)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("unnorm_key=nobody", "no statistics for unnorm_key 'nobody'; known: "),
        ("server.max_queue=0", "these must be positive: max_queue=0"),
        ("server.max_pixels=0", "these must be positive: max_pixels=0"),
        ("ckpt_path=/nope", "/nope"),
    ],
)
def test_what_cannot_be_served_is_one_message(checkpoint: Path, tmp_path: Path, override: str, said: str) -> None:
    usual = [f"ckpt_path={checkpoint}", f"paths.output_dir={tmp_path}", "server.port=0", "policy.device=cpu"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("serve", [*usual, override])
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        run(cfg)


def test_health_says_what_cannot_be_kept(policy: Policy) -> None:
    service = Service(policy)
    client = TestClient(build_app(service, None))
    assert client.get("/health").json() == {"status": "ok"}
    service.warnings = beyond(0.02, 0.3, deadline_ms=2, **USUAL)
    assert client.get("/health").json() == {"status": "too_slow", "warnings": service.warnings}
    service.batcher.join()
    assert client.get("/health").status_code == 503


def test_packages_that_serving_needs_are_named_before_a_checkpoint_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("openvla_lightning.serve.__main__.find_spec", lambda name: None if name == "fastapi" else name)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("serve", ["ckpt_path=/nope"])
    with pytest.raises(SystemExit, match=r"serving needs fastapi: pip install 'openvla-lightning\[serve\]', or in a"):
        run(cfg)
