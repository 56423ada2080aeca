"""The client that plays a chunk and asks for the next one meanwhile, against a server in a process of its own."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from serving_world import Running, picture, start, statistics
from tiny_parts import LLAMA, TOWERS

from openvla_lightning.action_head import L1Head
from openvla_lightning.client import ChunkPlayer, Client, ServerError
from openvla_lightning.model import VLA
from openvla_lightning.processor import Processor

WORDS, CHUNK = "lift the red cube", 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A policy with chunks of four, which answers each picture differently."""
    torch.manual_seed(0)
    head, folder = L1Head(CHUNK, 7), tmp_path_factory.mktemp("chunks")
    vla = VLA.from_config(
        {
            "vision_backbone": {"towers": TOWERS, "image_size": 32},
            "projector": {"kind": "mlp"},
            "llm": {"name": "tiny", "architecture": LLAMA, "vocab_size": 768},
            "action_head": {"class": "L1Head", **head.config},
        }
    ).eval()
    with torch.no_grad():
        for parameter in vla.parameters():
            parameter.mul_(2.0)
    vla.norm_stats = {"toy": statistics(1.0).to_dict()}
    vla.save_pretrained(folder / "policy", Processor(head, tokenizer="tiny", image_size=32, towers=TOWERS))
    running = start(folder / "policy", folder / "log", "server.deadline_ms=20000")
    yield running
    running.end()


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.url, timeout=30) as client:
        yield client


class Slow(Client):
    """Answers when told to, and fails as often as told to."""

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout=30)
        self.ready, self.failures, self.asked = threading.Event(), 0, 0
        self.ready.set()

    def _exchange(self, message: bytes) -> dict:
        self.asked += 1
        assert self.ready.wait(30)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no answer")
        return super()._exchange(message)


def played(player: ChunkPlayer, steps: range, words: str = WORDS, seconds: float = 0.0) -> np.ndarray:
    """What is done at these steps, each with a picture of its own."""
    actions = []
    for step in steps:
        actions.append(player.act(picture(step), words))
        coming = player._coming
        if coming is not None and not seconds:
            coming[0].exception()  # each answer is there before the next step
        time.sleep(seconds)
    return np.stack(actions)


def test_each_action_is_of_the_newest_chunk_that_could_be_there(client: Client) -> None:
    chunks = [client.act_chunk(picture(step), WORDS) for step in range(12)]
    assert chunks[0].shape == (CHUNK, 7)
    assert len(np.unique(np.concatenate(chunks), axis=0)) > 40, "chunks that are alike would show nothing"
    for ahead, execute, expected in (
        (1, None, [(0, 0), (0, 1), (0, 2), (0, 3), (3, 1), (3, 2), (3, 3), (6, 1), (6, 2), (6, 3)]),
        (2, None, [(0, 0), (0, 1), (0, 2), (0, 3), (2, 2), (2, 3), (4, 2), (4, 3), (6, 2), (6, 3)]),
        (1, 2, [(0, 0), (0, 1), (1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)]),
    ):
        with ChunkPlayer(client, ahead=ahead, execute=execute) as player:
            found = played(player, range(10))
        np.testing.assert_array_equal(found, [chunks[asked][place] for asked, place in expected], f"{ahead} {execute}")


def test_a_late_answer_is_waited_for_and_its_first_actions_are_over_by_then(server: Running) -> None:
    with Slow(server.url) as client, ChunkPlayer(client, ahead=2, execute=3) as player:
        chunks = [client.act_chunk(picture(step), WORDS) for step in range(5)]
        first = [player.act(picture(step), WORDS) for step in (0,)]
        client.ready.clear()
        first += [player.act(picture(step), WORDS) for step in (1, 2, 3)]  # the fourth is played, as nothing came
        np.testing.assert_array_equal(first, chunks[0])
        threading.Timer(0.3, client.ready.set).start()
        np.testing.assert_array_equal(player.act(picture(4), WORDS), chunks[1][3])
        assert 0.2 < player.waited < 10
        assert player.latency > 0.2


def test_the_lead_follows_from_the_time_that_an_answer_takes(server: Running) -> None:
    with Slow(server.url) as client, ChunkPlayer(client, rate_hz=10) as player:
        for latency, lead in ((0.0, 0), (0.05, 1), (0.15, 2), (9.0, 3)):
            player.latency = latency
            assert player._lead(CHUNK) == lead
        assert player._lead(1) == 0
        played(player, range(8))
        assert player.latency < 9


def test_other_words_and_other_episodes_begin_anew(client: Client) -> None:
    other = "open the drawer"
    with ChunkPlayer(client, ahead=1) as player:
        played(player, range(2))
        np.testing.assert_array_equal(player.act(picture(2), other), client.act(picture(2), other))
        player.reset()
        np.testing.assert_array_equal(player.act(picture(3), other), client.act(picture(3), other))


def test_a_failure_is_asked_again_while_there_is_something_to_play(server: Running) -> None:
    with Slow(server.url) as client, ChunkPlayer(client, ahead=2) as player:
        chunks = [client.act_chunk(picture(step), WORDS) for step in range(5)]
        played(player, range(2))
        client.failures = 1
        found = played(player, range(2, 5))
        np.testing.assert_array_equal(found, [chunks[0][2], chunks[0][3], chunks[3][1]])
        client.failures = 100
        with pytest.raises(ConnectionError):
            played(player, range(5, 20))
        client.failures = 0
        np.testing.assert_array_equal(player.act(picture(0), WORDS), chunks[0][0])


def test_a_refusal_is_the_servers_own(client: Client) -> None:
    with ChunkPlayer(client, ahead=1) as player, pytest.raises(ServerError, match="known"):
        player.act(picture(0), WORDS, unnorm_key="nobody")


def test_a_robot_with_time_to_think_never_waits(client: Client) -> None:
    with ChunkPlayer(client, ahead=3) as player:
        played(player, range(9), seconds=0.3)
        assert player.waited < 0.3 * 9


def test_arguments_are_checked() -> None:
    for wrong in ({}, {"ahead": 1, "rate_hz": 5.0}, {"ahead": 0}, {"rate_hz": -1.0}, {"ahead": 1, "execute": 0}):
        with pytest.raises(ValueError, match=r"rate_hz|ahead|execute"):
            ChunkPlayer(Client(), **wrong)  # type: ignore[arg-type]
