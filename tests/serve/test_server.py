"""A server process and its clients: what the released one sends, ours, those in a hurry, and those who come after."""

import base64
import io
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

import httpx
import json_numpy
import numpy as np
import pytest
from PIL import Image
from serving_world import Running, picture, start

from openvla_lightning.client import Client, ServerError
from openvla_lightning.policy import Policy

WORDS = "lift the red cube"


def ask(url: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{url}/act", content=json_numpy.dumps({"image": picture(0), "instruction": WORDS} | fields))


def test_the_released_client_gets_the_policys_action(server: Running, policy: Policy) -> None:
    code = (
        "import requests, json_numpy, numpy as np; json_numpy.patch()\n"
        f"image = np.random.default_rng(5).integers(0, 256, (40, 48, 3), dtype=np.uint8)\n"
        f"print(*requests.post('{server.url}/act', json={{'image': image, 'instruction': '{WORDS}'}}).json())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    np.testing.assert_array_equal([float(word) for word in done.stdout.split()], policy.act(picture(5), WORDS))


def test_doubly_encoded_is_answered_so(server: Running, policy: Policy) -> None:
    told = json_numpy.dumps({"image": picture(1), "instruction": WORDS, "unnorm_key": "fractal"})
    answer = httpx.post(f"{server.url}/act", json={"encoded": told})
    np.testing.assert_array_equal(json_numpy.loads(answer.json()), policy.act(picture(1), WORDS, "fractal"))


def test_each_way_to_ask_gives_the_same(server: Running, policy: Policy) -> None:
    image, png = picture(2), io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    expected = policy.act(image, WORDS).tolist()
    assert ask(server.url, image=image).json() == expected
    assert ask(server.url, image=base64.b64encode(png.getvalue()).decode()).json() == expected
    with Client(server.url) as client:
        assert client.act(image, WORDS).tolist() == expected
        assert client.act(image[:, ::-1][:, ::-1], WORDS).tolist() == expected
        assert client.act(png.getvalue(), WORDS).tolist() == expected
        np.testing.assert_array_equal(client.act(image, WORDS, "fractal"), policy.act(image, WORDS, "fractal"))
        assert client.act_chunk({"image": image}, WORDS).tolist() == [expected]


def test_a_picture_that_is_too_large_for_the_server_is_refused_in_words(server: Running) -> None:
    """The server ends the connection at such a message, while the client still sends."""
    with Client(server.url) as client:
        with pytest.raises(ServerError, match=r"may have 1000000 bytes, not 270\d+; scale the image") as error:
            client.act(np.zeros((3000, 3000, 3), np.uint8), WORDS)
        assert (error.value.status, error.value.code) == (413, "too_large")
        assert client.act(picture(0), WORDS).shape == (7,)


def test_an_unknown_key_lists_the_known_ones_and_the_client_goes_on(server: Running) -> None:
    answer = ask(server.url, unnorm_key="bridge_orgi")
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "unknown_unnorm_key"
    assert answer.json()["error"]["known"] == ["bridge_orig", "fractal"]
    with Client(server.url) as client:
        with pytest.raises(ServerError, match="bridge_orig, fractal") as error:
            client.act(picture(0), WORDS, "bridge_orgi")
        assert error.value.status == 422
        assert client.act(picture(0), WORDS).shape == (7,)


def test_a_client_names_what_is_no_url() -> None:
    with pytest.raises(ValueError, match=r"begins with http:// or https://, got '192.168.0.7:8000'"):
        Client("192.168.0.7:8000")


def test_too_late_is_stale_and_never_an_action(server: Running) -> None:
    for answer in (ask(server.url, deadline_ms=1e-3), ask(server.url, deadline_ms=1e-9)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "stale")
    with Client(server.url) as client, pytest.raises(ServerError, match="deadline"):
        client.act(picture(0), WORDS, deadline_ms=1e-3)


def test_a_large_body_is_refused_before_it_is_read(server: Running) -> None:
    address = urlparse(server.url)
    with socket.create_connection((address.hostname, address.port), 60) as connection:
        connection.sendall(b"POST /act HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    pieces = (b"x" * 100_000 for _ in range(20))
    assert httpx.post(f"{server.url}/act", content=pieces).status_code == 413


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /a", b"POST /act HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"],
    ids=["none", "head", "body"],
)
def test_a_slow_client_is_told_and_dropped(server: Running, sent: bytes) -> None:
    address = urlparse(server.url)
    with socket.create_connection((address.hostname, address.port), 60) as connection:
        connection.sendall(sent)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_websocket_may_stay_for_longer_than_a_request(server: Running) -> None:
    with Client(server.url) as client:
        before = client.act(picture(0), WORDS)
        time.sleep(2.5)  # receive_seconds is 2
        np.testing.assert_array_equal(client.act(picture(0), WORDS), before)


def test_info_health_and_metrics_say_what_acts(server: Running, policy: Policy) -> None:
    with Client(server.url) as client:
        info = client.info()
    assert info["statistics"]["fractal"] == policy.norm_stats["fractal"]
    assert info["cameras"] == ["primary"]
    assert info["rate_hz"] > 0
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = httpx.get(f"{server.url}/metrics").text
    ask(server.url)
    after = httpx.get(f"{server.url}/metrics").text
    count = [float(text.partition('{code="ok",transport="http"} ')[2].split()[0]) for text in (before, after)]
    assert count[1] == count[0] + 1


def test_info_comes_from_the_server_itself_and_fails_as_acting_does(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the discard port: nothing answers there
    monkeypatch.delenv("no_proxy", raising=False)
    assert Client(server.url).info()["cameras"] == ["primary"]
    for nowhere in ("http://127.0.0.1:9", "http://no.such.host.invalid", f"{server.url}/elsewhere"):
        client = Client(nowhere, timeout=5)
        for asked in (client.info, lambda client=client: client.act(picture(0), WORDS)):
            with pytest.raises(ConnectionError, match=f"no answer from {nowhere}"):
                asked()


def test_many_robots_get_each_their_own_action(server: Running, policy: Policy) -> None:
    expected = [policy.act(picture(number), WORDS) for number in range(64)]
    assert len(np.unique(expected, axis=0)) > 32
    wrong: list[object] = []
    until = time.monotonic() + 4

    def robot(number: int) -> None:
        with Client(server.url, timeout=30) as client:
            while time.monotonic() < until:
                try:
                    if number % 2:
                        action: object = ask(server.url, image=picture(number)).json()
                    else:
                        action = client.act(picture(number), WORDS)
                except Exception as error:
                    action = repr(error)
                if not np.array_equal(action, expected[number]):
                    wrong.append((number, action))

    threads = [threading.Thread(target=robot, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    metrics = httpx.get(f"{server.url}/metrics").text
    sizes = dict(line.split() for line in metrics.splitlines() if line.startswith("openvla_batch_size_"))
    assert float(sizes["openvla_batch_size_sum"]) > float(sizes["openvla_batch_size_count"]), "none shared a batch"


def test_guarded_killed_restarted_and_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENVLA_LIGHTNING_TOKEN", "secret")
    first = start(checkpoint, tmp_path / "first", "server.port=0")
    assert httpx.get(f"{first.url}/health").status_code == 200
    assert ask(first.url).status_code == 401
    with Client(first.url) as stranger, pytest.raises(ConnectionError, match=r"asks for its token, .*401"):
        stranger.act(picture(0), WORDS)
    with Client(first.url, "secret") as client:
        action = client.act(picture(0), WORDS)
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(ConnectionError):
            client.act(picture(0), WORDS)
        second = start(checkpoint, tmp_path / "second", f"server.port={urlparse(first.url).port}")
        np.testing.assert_array_equal(client.act(picture(0), WORDS), action)
    assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert second.end() == 0
    assert "Stopped" in second.log.read_text()
