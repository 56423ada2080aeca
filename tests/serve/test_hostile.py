"""Requests that mean harm: each is answered with 4xx, and the server is as well and as large afterwards as before.

OPENVLA_HOSTILE=10000 sends that many instead of a thousand.
"""

import base64
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import httpx
import json_numpy
import msgpack
import numpy as np
import psutil
import pytest
from PIL import Image
from serving_world import Running, picture
from websockets.sync.client import connect

from openvla_lightning.policy import Policy
from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.reading import Reader

COUNT = int(os.environ.get("OPENVLA_HOSTILE", "1000"))
PATHS = ("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "..\\..\\x", "/proc/self/environ", "%2e%2e/%00", "~")


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG whose header may lie about `data`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BOMB = png(50_000, 50_000, zlib.compress(bytes(10_000_000), 9))
TEXT_BOMB = png(4, 4, b"")[:33] + (lambda body: struct.pack(">I", len(body)) + b"zTXt" + body + bytes(4))(
    b"k\0\0" + zlib.compress(bytes(5_000_000))
)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def file(kind: str) -> bytes:
    """A small picture as a file."""
    written = io.BytesIO()
    Image.fromarray(picture(1, (16, 16))).save(written, kind)
    return written.getvalue()


FILES = {kind: file(kind) for kind in ("PNG", "JPEG", "GIF")}
ARRAYS = (*(np.full((8, 8, 3), value) for value in (np.nan, np.inf, 1e308)), np.zeros((1, 4000, 3), np.uint8))
BAD = (text(BOMB), text(TEXT_BOMB), text(FILES["GIF"]), *map(json_numpy.default, ARRAYS))
HUGE = (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, bytes(1_000_001), b" " * 1_200_000)


def array(rng: random.Random) -> object:
    """An image in the form of json_numpy, with something wrong about it."""
    wrong = json_numpy.default(picture(rng.randrange(99), (8, 8)))
    field, value = rng.choice(
        [
            ("dtype", rng.choice(["|O", "object", "<f4", "<U9", "V192", None, 7, [["a", "|O"]], "x" * 999])),
            ("shape", rng.choice([[8, 8], [-1, 8, 3], [8, 8, 4], [2**62, 2**62, 3], [0, 8, 3], "8,8,3", [8.0, 8, 3]])),
            ("shape", [rng.randrange(9, 300), rng.randrange(9, 300), 3]),
            ("shape", [10**400, 1, 3]),
            ("__numpy__", rng.choice(["!!", text(b"x"), None, 3, {}, "é", text(rng.randbytes(rng.randrange(190)))])),
        ]
    )
    return {**wrong, field: value}


def image(rng: random.Random) -> object:
    broken = rng.choice([FILES["PNG"], FILES["JPEG"]])[: rng.randrange(1, 60)]
    return rng.choice(
        [
            *(*BAD, text(broken), text(rng.randbytes(rng.randrange(300))), rng.choice(PATHS)),
            *(None, True, 0, -1.5, [], {}, [[[0, 0, 0]]], {"data": "x", "shape": [1, 1, 3]}, {"url": PATHS[2]}),
            *(array(rng) for _ in range(8)),
        ]
    )


def fields(rng: random.Random) -> dict[str, object]:
    """What is asked, with one thing wrong."""
    asked: dict[str, object] = {"image": json_numpy.default(picture(0, (8, 8))), "instruction": "lift"}
    wrong_texts = [None, 5, "", "   ", [], {}, "x" * 1001, "\0", "a\x1b[2J", "\ud800", "line\nline", ["lift"]]
    return asked | rng.choice(
        [
            *({"image": image(rng)} for _ in range(6)),
            {"instruction": rng.choice(wrong_texts)},
            {"unnorm_key": rng.choice([*PATHS, "nobody", "", 7, ["bridge_orig"], "x" * 5000, "\ud800", "__class__"])},
            {"deadline_ms": rng.choice([0, -1, "1", True, [], {}, -(10**400), 10**400])},
            {rng.choice(["pickle", "__numpy__", "x" * 999, *PATHS]): 1},
        ]
    )


def body(rng: random.Random) -> bytes:
    asked = json.dumps(fields(rng)).encode()
    place = rng.randrange(len(asked))
    return rng.choice(
        [
            *(asked, asked, asked, asked, json.dumps({"encoded": asked.decode()}).encode()),
            json.dumps({"encoded": rng.choice([1, None, "{", "[]", asked.decode()[:place]]), "x": 1}).encode(),
            rng.randbytes(rng.randrange(2000)),
            asked[:place],
            b"[" * 10,
            *HUGE[:3],
            rng.choice([b"", b"null", b"NaN", b"[]", b'"lift"', b"\xff\xfe{", b'{"image": NaN, "instruction": "x"}']),
            b"\x80\x04\x95" + rng.randbytes(40),
            rng.choice(HUGE),
        ]
    )


def requests(count: int, seed: int) -> Iterator[Callable[[httpx.Client, str], httpx.Response]]:
    rng = random.Random(seed)
    for _ in range(count):
        content = body(rng)
        if rng.random() < 0.9:
            headers = rng.choice([{}, {"content-type": "text/x"}, {"authorization": "Bearer " + "x" * 999}])
            yield lambda client, url, c=content, h=headers: client.post(f"{url}/act", content=c, headers=h)
        else:
            method, path = rng.choice(["GET", "PUT", "DELETE"]), rng.choice(["/act", *(f"/{p}" for p in PATHS), "/ws"])
            yield lambda client, url, m=method, p=path: client.request(m, url + p)


def test_each_is_refused_and_nothing_is_left_behind(server: Running, policy: Policy) -> None:
    process, answers = psutil.Process(server.process.pid), {}
    with httpx.Client(timeout=30) as client:
        for number, send in enumerate(requests(COUNT, seed=0)):
            answer = send(client, server.url)
            assert 400 <= answer.status_code < 500, (number, answer.status_code, answer.text[:300])
            code = answer.json()["error"]["code"]
            answers[code] = answers.get(code, 0) + 1
            if number == COUNT // 3:
                before = process.memory_info().rss
        grown = process.memory_info().rss - before
        good = client.post(f"{server.url}/act", content=json_numpy.dumps({"image": picture(3), "instruction": "lift"}))
    np.testing.assert_array_equal(good.json(), policy.act(picture(3), "lift"))
    assert {"bad_request", "wrong_image", "unknown_unnorm_key", "too_large", "no_such_thing"} <= set(answers)
    assert grown < 30e6, f"{grown / 1e6:.0f} MB more after {COUNT} requests: {answers}"
    print(f"{answers}, {grown / 1e6:.1f} MB")


def test_a_websocket_survives_what_it_is_sent(server: Running, policy: Policy) -> None:
    rng = random.Random(1)
    with connect(server.url.replace("http", "ws") + "/ws", proxy=None) as socket:
        for _ in range(COUNT // 10):
            asked = fields(rng)
            try:
                message = msgpack.packb(asked)
            except (ValueError, OverflowError):  # a lone surrogate, a number beyond 64 bits
                message = rng.randbytes(50)
            socket.send(rng.choice([message, message, message[:-1], rng.randbytes(99), b"\x91" * 5000, "text"]))
            assert 400 <= msgpack.unpackb(socket.recv(10))["error"]["status"] < 500
        good = {"image": {"data": picture(3).tobytes(), "shape": [40, 48, 3]}, "instruction": "lift"}
        socket.send(msgpack.packb(good))
        np.testing.assert_array_equal(msgpack.unpackb(socket.recv(10))["action"], policy.act(picture(3), "lift"))


def test_a_bomb_is_not_unpacked(policy: Policy) -> None:
    reader = Reader(policy.processor.transform.resize, policy.norm_stats, 100_000)
    with pytest.raises(Refused, match="100000 pixels") as error:
        reader.from_json(json.dumps({"image": text(BOMB), "instruction": "lift"}).encode())
    assert error.value.status == 413
