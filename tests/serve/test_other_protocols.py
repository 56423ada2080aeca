"""Clients of other projects: what they send and what they understand, written down here from their sources.

OPENVLA_HOSTILE=10000 sends that many wrong messages on each protocol instead of a hundred.
"""

import base64
import io
import os
import random
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image
from serving_world import TOKEN, Running, picture, start
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from openvla_lightning.policy import Policy
from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.protocols import OpenPi, VlaEval, observed
from openvla_lightning.serve.reading import Reader

COUNT = int(os.environ.get("OPENVLA_HOSTILE", "100"))


def pi_array(array: np.ndarray) -> dict[bytes, Any]:
    """An array as openpi's client packs it."""
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def harness_array(array: np.ndarray, form: str = "raw") -> dict[str, Any]:
    """An array, or in another form an image, as the harness packs it."""
    if form == "raw":
        return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}
    written = io.BytesIO()
    Image.fromarray(array).save(written, form.upper())
    return {"__image__": True, "format": form, "data": written.getvalue(), "shape": list(array.shape)}


def unpacked(part: dict[Any, Any]) -> np.ndarray:
    told = {key.decode() if isinstance(key, bytes) else key: value for key, value in part.items()}
    return np.frombuffer(told["data"], told["dtype"]).reshape(told["shape"])


def harness(kind: str, payload: Any, seq: int = 1) -> bytes:
    return msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0})


def opened(server: Running, path: str, **options: Any) -> ClientConnection:
    return connect(server.url.replace("http", "ws") + path, proxy=None, compression=None, **options)


def gripper_of_the_harness(action: np.ndarray) -> np.ndarray:
    return np.array([*action[:6], -1.0 if action[6] > 0.5 else 1.0], np.float32)


@pytest.mark.parametrize("path", ["/", "/openpi"])
def test_openpis_client_gets_the_chunk(server: Running, policy: Policy, path: str) -> None:
    image, wrist, state = picture(5), picture(6), np.zeros(8, np.float32)
    seen = [
        {"observation/image": pi_array(image), "observation/wrist_image": pi_array(wrist), "prompt": "lift"},
        {"observation/exterior_image_1_left": pi_array(image), "observation/state": pi_array(state), "prompt": "lift"},
        {"image": pi_array(image), "prompt": ["lift"], "observation/gripper_position": pi_array(state[:1])},
        {"observation": {"image": pi_array(image)}, "prompt": "lift"},
        {"images": {"cam_high": pi_array(image)}, "state": pi_array(state), "prompt": "lift"},
    ]
    with opened(server, path) as socket:
        about = msgpack.unpackb(socket.recv(10))
        assert about["action_dim"] == 7
        assert about["cameras"] == ["primary"]
        for one in seen:
            socket.send(msgpack.packb(one))
            answer = msgpack.unpackb(socket.recv(10))
            actions = unpacked(answer["actions"])
            np.testing.assert_array_equal(actions, policy.act(image, "lift")[None])
            assert answer["server_timing"]["infer_ms"] > 0
        socket.send(msgpack.packb({"prompt": "lift"}))
        said = socket.recv(10)
        assert isinstance(said, str)  # to that client a text is an error
        assert "the policy needs image" in said
        socket.send(msgpack.packb(seen[0]))
        assert isinstance(socket.recv(10), bytes)


def test_the_harness_gets_one_action_for_each_observation(server: Running, policy: Policy) -> None:
    image = picture(7)
    with opened(server, "/vla_eval") as socket:
        socket.send(harness("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 5))
        hello = msgpack.unpackb(socket.recv(10))
        assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 5, 1)
        assert hello["payload"]["action_spec"]["gripper"]["format"] == "binary_close_positive"
        socket.send(harness("episode_start", {"task": {"name": "lift"}}, 6))
        for seq, form in enumerate(("raw", "png"), 7):
            seen = {"images": {"agentview": harness_array(image, form)}, "task_description": "lift", "states": [0.0]}
            socket.send(harness("observation", seen, seq))
            answer = msgpack.unpackb(socket.recv(10))
            assert (answer["type"], answer["seq"]) == ("action", seq)
            expected = gripper_of_the_harness(policy.act(image, "lift"))
            np.testing.assert_array_equal(unpacked(answer["payload"]["actions"]), expected)
        socket.send(harness("observation", {"images": {}, "task_description": "lift"}, 9))
        answer = msgpack.unpackb(socket.recv(10))
        assert (answer["type"], answer["seq"], answer["payload"]["code"]) == ("error", 9, "bad_request")
        socket.send(harness("episode_end", {}, 10))


def reader(views: tuple[str, ...] = ("primary",), proprio: bool = False) -> Reader:
    return Reader(lambda image: np.asarray(image), {}, 2**20, views, proprio)


def test_a_chunk_is_executed_to_its_end_and_dropped_with_its_episode() -> None:
    spoken = VlaEval(reader(), dict)
    seen = harness("observation", {"images": {"a": harness_array(picture(1))}, "task_description": "go"}, 3)
    assert spoken.asks(seen)
    question = spoken.read(seen)
    assert question.chunk
    chunk = np.arange(21, dtype=float).reshape(3, 7)
    answers = [spoken.answer(question, chunk, 0.0)]
    while (held := spoken.held()) is not None:
        answers.append(spoken.answer(question, held, 0.0))
    first = [unpacked(msgpack.unpackb(answer)["payload"]["actions"])[0] for answer in answers]
    assert first == [0, 7, 14]
    spoken.answer(question, chunk, 0.0)
    assert not spoken.asks(harness("episode_start", {}))
    assert spoken.held() is None


def test_what_a_policy_reads_is_found_under_the_names_of_others() -> None:
    wrist, state = picture(2), np.arange(8, dtype=np.float64)
    two = reader(("primary", "wrist"), proprio=True)
    pi = {"observation/image": pi_array(picture(1)), "observation/wrist_image": pi_array(wrist), "prompt": "go"}
    found = observed(two, pi | {"observation/state": pi_array(state)})
    assert found["proprio"] == state.tolist()
    question = OpenPi(two, dict).read(msgpack.packb(pi | {"observation/state": pi_array(state)}))
    np.testing.assert_array_equal(question.observation.images["wrist"], wrist)
    spoken = VlaEval(two, dict)
    images = {"agentview": harness_array(picture(1)), "wrist": harness_array(wrist)}
    message = harness("observation", {"images": images, "task_description": "go", "states": harness_array(state)})
    assert spoken.asks(message)
    np.testing.assert_array_equal(spoken.read(message).observation.images["wrist"], wrist)
    for wrong in (np.zeros((2, 3)), np.zeros(2000), np.array(["a"]), np.zeros(3, complex)):
        with pytest.raises(Refused):
            observed(two, pi | {"observation/state": pi_array(wrong)})
    with pytest.raises(Refused, match="needs proprio"):
        observed(two, pi)


def test_the_token_is_asked_for_as_these_clients_send_it(checkpoint: Path, tmp_path: Path) -> None:
    guarded = start(checkpoint, tmp_path / "log", f"server.token={TOKEN}")
    try:
        basic = base64.b64encode(f"robot:{TOKEN}".encode()).decode()
        for said in (f"Bearer {TOKEN}", f"Api-Key {TOKEN}", f"Basic {basic}"):
            with opened(guarded, "/openpi", additional_headers={"Authorization": said}) as socket:
                assert msgpack.unpackb(socket.recv(10))["action_dim"] == 7
        for wrong in ({}, {"Authorization": TOKEN}, {"Authorization": "Basic !"}, {"Authorization": "Api-Key x"}):
            for path in ("/", "/openpi", "/vla_eval"):
                with pytest.raises(InvalidStatus, match="401"):
                    opened(guarded, path, additional_headers=wrong)
    finally:
        guarded.end()


def part(rng: random.Random, depth: int = 0) -> Any:
    """Anything that msgpack can say."""
    plain = [None, True, -1, 2**60, 1e308, float("nan"), "lift", "\0", "x" * 5000, b"", rng.randbytes(50), [], {}]
    if depth > 3 or rng.random() < 0.4:
        return rng.choice(plain)
    if rng.random() < 0.4:
        return [part(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["a", b"b", "image", "__ndarray__", b"__ndarray__"]): part(rng, depth + 1) for _ in range(3)}


SHAPES = ([8, 8], [-1, 8, 3], [2**40, 2**20, 3], [0, 8, 3], "8,8,3", [8.5, 8, 3], None, [8, 8, 4])


def wrong_array(rng: random.Random) -> Any:
    array = rng.choice([pi_array, harness_array])(picture(1, (8, 8)))
    keys = {str(key).strip("b'"): key for key in array}
    field, value = rng.choice(
        [
            ("dtype", rng.choice(["|O", "<f4", "V9", None, 7, "x" * 999, ["a"]])),
            (
                "shape",
                rng.choice([[8, 8], [-1, 8, 3], [2**40, 2**20, 3], [0, 8, 3], "8,8,3", [8.5, 8, 3], None, [8, 8, 4]]),
            ),
            ("data", rng.choice([b"", None, "text", rng.randbytes(100), 5])),
        ]
    )
    return array | {keys[field]: value}


def wrong_message(rng: random.Random, path: str) -> bytes | str:
    """A message with something wrong about it."""
    good = pi_array(picture(1, (8, 8)))
    pictures = [
        wrong_array(rng),
        wrong_array(rng),
        part(rng),
        {"__image__": True, "format": "png", "data": rng.randbytes(60)},
    ]
    words = ["", " ", "\0", "a\x1b[2J", "x" * 1001, 5, None, [], ["a", "b"], {}]
    seen: dict[Any, Any] = rng.choice(
        [
            {"observation/image": rng.choice(pictures), "prompt": "lift"},
            {"observation/image": good, "prompt": rng.choice(words)},
            {"observation/image": good},
            {"prompt": "lift"},
        ]
    )
    if path == "/vla_eval":
        payload: Any = {"images": {"a": seen.get("observation/image")}} | (
            {"task_description": seen["prompt"]} if "prompt" in seen else {}
        )
        if "observation/image" not in seen:
            del payload["images"]
        body: Any = {"type": "observation", "payload": payload, "seq": 1, "timestamp": 0.0}
        if rng.random() < 0.3:
            body |= rng.choice([{"type": "act"}, {"type": 5}, {"seq": "1"}, {"seq": True}, {"payload": part(rng)}])
        if body.get("payload") == {}:
            body["payload"] = None
    else:
        body = seen
    packed = msgpack.packb(body)
    kinds = [packed] * 6 + [packed[: rng.randrange(len(packed))], rng.randbytes(80), "text", b"\x91" * 3000, b"\xc1"]
    return rng.choice(kinds)


@pytest.mark.parametrize("path", ["/openpi", "/vla_eval"])
def test_what_means_harm_is_refused_and_the_next_question_answered(server: Running, policy: Policy, path: str) -> None:
    rng = random.Random(2)
    with opened(server, path) as socket:
        if path == "/openpi":
            socket.recv(10)
        for number in range(COUNT):
            message = wrong_message(rng, path)
            socket.send(message)
            said = socket.recv(10)
            if path == "/openpi":
                assert isinstance(said, str), (number, message[:200])
                assert 400 <= int(said.split()[0]) < 500, said
            else:
                answer = msgpack.unpackb(said)
                assert answer["type"] == "error", (number, message[:200])
                assert 400 <= answer["payload"]["status"] < 500
        image = picture(3)
        if path == "/openpi":
            socket.send(msgpack.packb({"image": pi_array(image), "prompt": "lift"}))
            found = unpacked(msgpack.unpackb(socket.recv(10))["actions"])[0]
            np.testing.assert_array_equal(found, policy.act(image, "lift"))
        else:
            seen = {"images": {"a": harness_array(image)}, "task_description": "lift"}
            socket.send(harness("observation", seen, 77))
            answer = msgpack.unpackb(socket.recv(10))
            np.testing.assert_array_equal(
                unpacked(answer["payload"]["actions"]), gripper_of_the_harness(policy.act(image, "lift"))
            )
