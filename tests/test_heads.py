"""Every action head trains, resumes after SIGKILL, adapts, is shared over processes, acts, serves and comes back."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import json_numpy
import numpy as np
import pytest
import torch
from heads_world import HEADS
from serving_world import start
from test_parallel import curve, weights

from openvla_lightning.checkpoint.export import export
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.client import Client
from openvla_lightning.policy import Policy
from openvla_lightning.types import Observation

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings of heads_world.py, in one go: it imports everything once."""
    root = tmp_path_factory.mktemp("heads")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "heads_world.py"), str(root)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def scene(rows: int) -> tuple[list[np.ndarray], list[str]]:
    """Pictures of noise, and words of different length."""
    random = np.random.default_rng(rows)
    words = ["pick up the cup", "put the red block behind the large blue bowl", "open the drawer"]
    pictures = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(rows)]
    return pictures, [words[row % len(words)] for row in range(rows)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", HEADS)
def test_it_learns_and_goes_on_after_a_kill_as_if_nothing_had_happened(world: Path, name: str) -> None:
    expected, found = curve(world / name / "run"), curve(world / f"{name}_killed" / "run")
    assert list(expected) == list(range(8))
    assert len(set(expected) - set(found)) <= 1, "the kill may have come between a checkpoint and its line"
    assert found == pytest.approx({step: expected[step] for step in found}, abs=1e-6)
    last = "run/checkpoints/step_000008.ckpt"
    again = weights(world / f"{name}_killed" / last)
    for key, value in weights(world / name / last).items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", HEADS)
def test_two_processes_learn_what_one_learns(world: Path, name: str, strategy: str) -> None:
    expected = curve(world / name / "run")
    assert curve(world / f"{name}_{strategy}" / "run") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_a_policy_acts_in_a_batch_as_alone_and_twice_alike(world: Path, name: str) -> None:
    pictures, words = scene(3)

    def policy() -> Policy:
        return Policy.from_pretrained(world / name / "run", device="cpu", dtype="float32", seed=5)

    together = policy().act(pictures, words)
    assert together.shape == (3, 7)
    assert np.isfinite(together).all()
    alone = [policy().act(picture, text) for picture, text in zip(pictures, words, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)
    np.testing.assert_array_equal(policy().act(pictures, words), together)


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_learns_beside_a_head_that_learns_in_full(world: Path, name: str) -> None:
    path = newest_checkpoint(world / f"{name}_lora" / "run")
    assert path is not None
    learnt = set(weights(path))
    assert any(".lora_" in key for key in learnt)
    new = (".action_head.", ".scale.", ".shift.")
    heads = {key for key in weights(world / name / "run/checkpoints/step_000008.ckpt") if any(n in key for n in new)}
    assert heads <= learnt, "a new part learns in full, without an adapter of its own"
    assert not [key for key in learnt if ".action_head." in key and ".lora_" in key]
    pictures, words = scene(1)
    policy = Policy.from_pretrained(path, device="cpu", dtype="float32")
    assert np.isfinite(policy.act(pictures[0], words[0])).all()


@pytest.mark.parametrize("name", ["l1", "diffusion", "parallel"])
@pytest.mark.parametrize("kind", ["run", "lora"])
def test_an_export_in_the_layout_of_openvla_oft_acts_alike(world: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = newest_checkpoint(world / (name if kind == "run" else f"{name}_lora") / "run")
    assert path is not None
    exported = export(path, tmp_path / "exported")
    parts = {file.name.partition("--")[0] for file in exported.glob("*.pt")}
    assert parts == {
        "l1": {"action_head", "vision_backbone"},  # it has FiLM
        "diffusion": {"action_head", "noisy_action_projector"},
        "parallel": set(),
    }.get(name)
    pictures, words = scene(2)
    own, again = (Policy.from_pretrained(place, device="cpu", dtype="float32", seed=5) for place in (path, exported))
    assert again.processor.action_head.config == own.processor.action_head.config
    seen = [Observation({"primary": picture}, text) for picture, text in zip(pictures, words, strict=True)]
    np.testing.assert_allclose(again.act_chunk(seen), own.act_chunk(seen), atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_exported_it_comes_back_and_acts_the_same(world: Path, name: str, tmp_path: Path) -> None:
    path = newest_checkpoint(world / name / "run")
    assert path is not None
    export(path, tmp_path / "folder")
    pictures, words = scene(2)
    before, after = (Policy.from_pretrained(p, device="cpu", dtype="float32") for p in (path, tmp_path / "folder"))
    assert after.processor.action_head.config == before.processor.action_head.config
    np.testing.assert_array_equal(after.act(pictures, words), before.act(pictures, words))


@pytest.mark.parametrize("name", HEADS)
def test_a_server_answers_with_its_actions(world: Path, name: str, tmp_path: Path) -> None:
    path = newest_checkpoint(world / name / "run")
    assert path is not None
    server = start(path, tmp_path / "log", "server.deadline_ms=60000", "policy.seed=5", "policy.dtype=float32")
    try:
        (picture,), (words,) = scene(1)
        policy = Policy.from_pretrained(path, device="cpu", dtype="float32", seed=5)
        expected = policy.act_chunk([Observation({"primary": picture}, words)])[0]
        assert expected.shape == (4, 7)
        body = json_numpy.dumps({"image": picture, "instruction": words})
        with Client(server.url, timeout=60) as client:
            answers = [httpx.post(f"{server.url}/act", content=body, timeout=60).json(), client.act(picture, words)]
            chunk = client.act_chunk(picture, words)
            assert chunk.shape == (4, 7)
    finally:
        server.end()
    sampled = name in ("diffusion", "flow", "insulated", "cogact")
    for answer in (*answers, chunk[0]):
        assert np.isfinite(answer).all()
        if not sampled:
            np.testing.assert_allclose(answer, expected[0], atol=1e-5)
