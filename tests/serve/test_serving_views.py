"""A policy with several views, the state and chunks, asked over HTTP and a WebSocket."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import json_numpy
import msgpack
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from serving_world import picture, statistics
from tiny_parts import LLAMA, TOWERS

from openvla_lightning.action_head import TokenHead
from openvla_lightning.model import VLA
from openvla_lightning.policy import Policy
from openvla_lightning.processor import Processor
from openvla_lightning.serve.app import Service, build_app
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Observation

WORDS, STATE = "lift the red cube", [0.5, -0.25, 1.0]
CONFIG = {
    "vision_backbone": {"towers": TOWERS, "image_size": 32},
    "projector": {"kind": "mlp"},
    "llm": {"name": "tiny", "architecture": LLAMA, "vocab_size": 768},
    "proprio_dim": 3,
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    head = TokenHead(vocab_size=768, action_chunk=2)
    processor = Processor(head, image_size=32, towers=TOWERS, cameras=["primary", "wrist"], proprio=True)
    states = DatasetStatistics.from_array(np.zeros((3, 7)) + np.arange(3)[:, None], np.eye(3)).proprio
    vla = VLA.from_config(CONFIG)
    with torch.no_grad():
        for parameter in vla.parameters():
            parameter.mul_(3.0)
    return Policy(vla, processor, {"toy": replace(statistics(1.0), proprio=states)}, device="cpu")


@pytest.fixture(scope="module")
def client(policy: Policy) -> Iterator[TestClient]:
    service = Service(policy, deadline=60.0)
    with TestClient(build_app(service)) as client:
        yield client
    service.batcher.join()


def fields(**other: Any) -> dict[str, Any]:
    return {"image": picture(0), "wrist_image": picture(1), "instruction": WORDS, "proprio": STATE} | other


def expected(policy: Policy) -> np.ndarray:
    resize = policy.processor.transform.resize
    images = {"primary": resize(picture(0)), "wrist": resize(picture(1))}
    return policy.act_chunk([Observation(images, WORDS, np.array(STATE, np.float32))])[0]


def post(client: TestClient, **other: Any) -> Any:
    return client.post("/act", content=json_numpy.dumps(fields(**other)))


def test_one_action_or_the_whole_chunk(client: TestClient, policy: Policy) -> None:
    chunk = expected(policy)
    assert chunk.shape == (2, 7)
    assert post(client).json() == chunk[0].tolist()
    assert post(client, chunk=True).json() == chunk.tolist()
    encoded = client.post("/act", json={"encoded": json_numpy.dumps(fields(chunk=True))})
    np.testing.assert_array_equal(json_numpy.loads(encoded.json()), chunk)
    raw = {name: v.tobytes() for name, v in (("image", picture(0)), ("wrist_image", picture(1)))}
    packed = {name: {"data": data, "dtype": "|u1", "shape": [40, 48, 3]} for name, data in raw.items()}
    with client.websocket_connect("/ws") as socket:
        for asked, answer in (({}, {"action": chunk[0].tolist()}), ({"chunk": True}, {"actions": chunk.tolist()})):
            socket.send_bytes(msgpack.packb({**packed, "instruction": WORDS, "proprio": STATE, **asked}))
            assert msgpack.unpackb(socket.receive_bytes()) == answer


def test_the_state_as_an_array(client: TestClient, policy: Policy) -> None:
    """json_numpy writes arrays of pictures and of numbers alike."""
    for dtype in (np.float32, np.float64):
        assert post(client, proprio=np.array(STATE, dtype)).json() == expected(policy)[0].tolist()
    whole = json_numpy.default(np.array(STATE))
    for change in ({"shape": [2]}, {"shape": [3, 1]}, {"dtype": "|O"}, {"dtype": []}, {"__numpy__": "?"}):
        assert post(client, proprio={**whole, **change}).json()["error"]["code"] == "wrong_proprio"
    assert post(client, proprio=np.array([np.nan, 0, 0])).json()["error"]["code"] == "wrong_proprio"


def test_the_client_of_openvla_oft(client: TestClient, policy: Policy) -> None:
    """What `get_action_from_server` of its robots sends, and the list of arrays that they execute."""
    chunk = expected(policy)
    said = {"full_image": picture(0), "wrist_image": picture(1), "state": np.array(STATE), "instruction": WORDS}
    for request in (said, {**said, "right_wrist_image": picture(2)}):  # pictures that the policy does not read
        actions = json_numpy.loads(client.post("/act", content=json_numpy.dumps(request)).text)
        assert isinstance(actions, list)
        assert [action.tolist() for action in actions] == chunk.tolist()
    encoded = client.post("/act", json={"encoded": json_numpy.dumps(said)}).json()
    assert [action.tolist() for action in json_numpy.loads(encoded)] == chunk.tolist()
    for wrong in ({**said, "image": picture(0)}, {k: v for k, v in said.items() if k != "state"}):
        assert client.post("/act", content=json_numpy.dumps(wrong)).json()["error"]["code"] == "bad_request"


def test_every_part_of_the_observation_counts(client: TestClient) -> None:
    plain = post(client, chunk=True).json()
    for other in ({"image": picture(5)}, {"wrist_image": picture(5)}, {"proprio": [0.0, 0.9, 0.1]}):
        assert post(client, chunk=True, **other).json() != plain


def test_a_request_without_what_the_policy_needs_is_told_so(client: TestClient) -> None:
    for name in ("wrist_image", "proprio"):
        told = {key: value for key, value in fields().items() if key != name}
        answer = client.post("/act", content=json_numpy.dumps(told))
        assert answer.status_code == 400
        known = "image, instruction, proprio, wrist_image, and if wanted unnorm_key, deadline_ms"
        assert known in answer.json()["error"]["message"]
    assert post(client, proprio=[1.0]).json()["error"]["code"] == "cannot_act"
    assert "expected 3 proprio dimensions" in post(client, proprio=[1.0]).json()["error"]["message"]
    for wrong in ("x", [], [True], ["1"], [1e40]):
        assert post(client, proprio=wrong).json()["error"]["code"] == "wrong_proprio"
    assert post(client, chunk=1).json()["error"]["code"] == "wrong_chunk"


def test_actions_relative_to_the_state_need_it_though_the_model_does_not_read_it(policy: Policy) -> None:
    processor = Processor(TokenHead(vocab_size=768), image_size=32, towers=TOWERS)
    own = policy.statistics
    relative = replace(own, action=own.action | {"relative_to": np.array([0, 1, 2, -1, -1, -1, -1])})
    vla = VLA.from_config({**CONFIG, "proprio_dim": None})
    service = Service(Policy(vla, processor, {"toy": relative}, device="cpu"), deadline=60.0)
    seen = {"image": picture(0), "instruction": WORDS}
    with TestClient(build_app(service)) as client:
        assert client.get("/info").json()["proprio"] is True
        first, moved = (
            np.array(client.post("/act", content=json_numpy.dumps({**seen, "proprio": state})).json())
            for state in ([0.0, 0.0, 0.0], STATE)
        )
        np.testing.assert_allclose(moved - first, [*STATE, 0, 0, 0, 0], atol=1e-9)
        for state, status in ((None, 422), ([0.5], 422), (STATE * 2, 422)):
            answer = client.post("/act", content=json_numpy.dumps({**seen, "proprio": state}))
            assert answer.status_code == status, answer.text
        assert client.post("/act", content=json_numpy.dumps(seen)).status_code == 400
        array = {b"__ndarray__": True, b"data": picture(0).tobytes(), b"dtype": "|u1", b"shape": [40, 48, 3]}
        with client.websocket_connect("/openpi") as socket:
            socket.receive_bytes()
            socket.send_bytes(msgpack.packb({"observation/image": array, "observation/state": STATE, "prompt": WORDS}))
            assert b"actions" in socket.receive_bytes()
    service.batcher.join()


def test_a_failure_of_the_server_is_counted_as_one_and_ends(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*arguments: Any) -> Any:
        raise RuntimeError("a fault of ours")

    service = Service(policy, deadline=60.0)
    monkeypatch.setattr(service, "act", fails)
    with TestClient(build_app(service), raise_server_exceptions=False) as client:
        assert post(client).status_code == 500
        with contextlib.suppress(RuntimeError), client.websocket_connect("/ws") as socket:
            socket.send_bytes(b"anything")
            socket.receive_bytes()
        assert service.open == 0, "stopping would wait for it"
        counts = client.get("/metrics").text
    for transport in ("http", "ws"):
        assert f'openvla_requests_total{{code="internal",transport="{transport}"}} 1.0' in counts
    service.batcher.join()


def test_the_server_says_what_it_needs(client: TestClient) -> None:
    info = client.get("/info").json()
    assert (info["cameras"], info["proprio"], info["action_chunk"]) == (["primary", "wrist"], True, 2)


def test_one_image_is_not_enough(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"looks at primary, wrist and is told .*: ask act_chunk"):
        policy.act(picture(0), WORDS)
    seen = Observation({"primary": picture(0)}, WORDS, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="there is no image wrist, but primary"):
        policy.act_chunk([seen])
    both = replace(seen, images={"primary": picture(0), "wrist": picture(1)}, proprio=None)
    with pytest.raises(ValueError, match="there is no proprio"):
        policy.act_chunk([both])


@pytest.mark.parametrize("state", [[np.nan] * 3, [0, np.inf, 0], [[0.0] * 3], ["a"] * 3, [None] * 3, 0.0])
def test_a_state_that_is_no_row_of_finite_numbers_gets_no_action(policy: Policy, state: Any) -> None:
    images = {"primary": picture(0), "wrist": picture(1)}
    with pytest.raises(ValueError, match=r"a robot's state \(proprio\) is one row of finite numbers, not "):
        policy.act_chunk([Observation(images, WORDS, state)])
    assert np.isfinite(policy.act_chunk([Observation(images, WORDS, [0, 0, 0])])).all(), "a list is a row, too"
