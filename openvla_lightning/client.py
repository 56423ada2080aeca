"""A robot's side of `openvla_lightning.serve`. Needs numpy, msgpack and websockets; no torch.

with Client("http://127.0.0.1:8000") as policy:
    action = policy.act(image, "pick up the can")
    actions = policy.act_chunk({"image": image, "wrist_image": wrist}, "pick up the can", proprio=state)

with Client("http://127.0.0.1:8000") as policy, ChunkPlayer(policy, rate_hz=10) as player:
    action = player.act(image, "pick up the can")  # at each step; the next chunk is asked for while this one is played
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import msgpack
import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

Picture = NDArray[np.uint8] | bytes
USUAL_BYTES = 2**23
"""The largest request of a server that was not told otherwise (`server.max_bytes`)."""


class ServerError(RuntimeError):
    """The server's answer when there is no action.

    Attributes:
        status: HTTP status code; 504: too late, 503: too busy or stopping, 4xx: the request is wrong.
        code: the same as a word.
        facts: everything the server said.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(facts["message"])
        self.status, self.code, self.facts = facts["status"], facts["code"], facts


class Client:
    """Asks a server for actions over one WebSocket, which is opened on first use and opened again after a failure.

    A client is for one thread; use one client per thread and robot.

    Args:
        url: the server's URL.
        token: the server's token, if it asks for one.
        timeout: seconds to wait for a connection or an answer.

    Raises:
        ValueError: `url` begins with neither `http://` nor `https://`.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 10.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a server's URL begins with http:// or https://, got {url!r}")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._socket: ClientConnection | None = None

    def act(
        self,
        image: Picture | Mapping[str, Picture],
        instruction: str,
        unnorm_key: str | None = None,
        deadline_ms: float | None = None,
        proprio: Sequence[float] | NDArray[np.floating] | None = None,
    ) -> NDArray[np.float64]:
        """Ask for an action.

        Args:
            image: uint8 [H, W, 3], RGB; or the bytes of a PNG or JPEG. For a policy with several views, all of them by
                name: `image`, `wrist_image`, `image@-1` (one step earlier); `info` lists them.
            instruction: the task in words.
            unnorm_key: dataset whose units to use; None: the server's default.
            deadline_ms: time after which the answer is of no use; None: the server's default.
            proprio: [P], the robot's state in its own units, for a policy that reads it.

        Returns:
            float64 [D], in the dataset's units, the gripper (1: open) last.

        Raises:
            ServerError: when the server refuses.
            ConnectionError: when there is no server, or it went away.
            TimeoutError: when no answer came in time.
        """
        return self._answer(_question(image, instruction, unnorm_key, deadline_ms, proprio))

    def act_chunk(
        self,
        image: Picture | Mapping[str, Picture],
        instruction: str,
        unnorm_key: str | None = None,
        deadline_ms: float | None = None,
        proprio: Sequence[float] | NDArray[np.floating] | None = None,
    ) -> NDArray[np.float64]:
        """Ask for a whole chunk of actions, float64 [T, D]; everything else is as in `act`."""
        return self._answer(_question(image, instruction, unnorm_key, deadline_ms, proprio, chunk=True))

    def info(self) -> dict[str, Any]:
        """Facts about the server's policy: statistics, cameras, limits, versions; errors are those of `act`."""
        direct = build_opener(ProxyHandler({}))  # as the WebSocket: a robot's server is not behind a proxy of the lab
        try:
            with direct.open(Request(f"{self.url}/info", headers=self._headers), timeout=self.timeout) as response:
                return json.load(response)
        except URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise error.reason from error
            raise ConnectionError(f"no answer from {self.url}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, question: bytes) -> NDArray[np.float64]:
        answer = self._exchange(question)
        if "error" in answer:
            raise ServerError(answer["error"])
        (actions,) = answer.values()
        return np.array(actions, np.float64)

    def _exchange(self, message: bytes) -> dict[str, Any]:
        # a server ends the connection at such a message, without a word that arrives
        if (size := len(message)) > USUAL_BYTES and size > (most := self.info()["max_bytes"]):
            said = f"a request may have {most} bytes, not {size}; scale the image or send a JPEG"
            raise ServerError({"status": 413, "code": "too_large", "message": said})
        try:
            if self._socket is None:
                address = "ws" + self.url.removeprefix("http") + "/ws"
                self._socket = connect(
                    address,
                    additional_headers=self._headers,
                    compression=None,
                    max_size=2**20,
                    open_timeout=self.timeout,
                    proxy=None,
                )
            self._socket.send(message)
            return msgpack.unpackb(self._socket.recv(timeout=self.timeout))
        except BaseException as error:
            self.close()  # otherwise a late answer would be taken for the next one
            if isinstance(error, InvalidStatus) and error.response.status_code == 401:
                said = "asks for its token, and got none or another one: Client(url, token=...)"
                raise ConnectionError(f"{self.url} {said} (HTTP 401)") from error
            if isinstance(error, WebSocketException | OSError) and not isinstance(error, TimeoutError):
                raise ConnectionError(f"no answer from {self.url}: {error}") from error
            raise


NOTHING: tuple[NDArray[np.float64], int, int] = (np.empty((0, 0)), 0, 0)


class ChunkPlayer:
    """Plays a server's chunks action by action, and asks for the next chunk while the robot still executes this one.

    A chunk's first action belongs to the picture of its request. When the chunk arrives, the robot has executed some
    more actions of the previous chunk. So the player drops as many actions of the new chunk and starts at the present
    step. A robot that moves by changes of its pose would otherwise make these changes twice.

    If an answer is late, the rest of the previous chunk is played, and then `act` waits. A new instruction drops all
    planned actions and asks again.

    Args:
        client: used by this player alone.
        rate_hz: actions that the robot executes per second. The next chunk is requested as many actions before the end
            of this one as the robot executed during the last request.
        ahead: in place of `rate_hz`, a fixed number of actions before the end.
        execute: how many actions of a chunk are executed at most; None: all that remain when it starts.

    Attributes:
        latency: seconds that the last answer took.
        waited: seconds that the robot waited for actions, without the wait for the first chunk of an episode.

    Raises:
        ValueError: for neither or both of `rate_hz` and `ahead`, or a number that is not positive.
    """

    def __init__(
        self, client: Client, rate_hz: float | None = None, ahead: int | None = None, execute: int | None = None
    ) -> None:
        if (rate_hz is None) == (ahead is None):
            raise ValueError("give rate_hz, how many actions a second the robot executes, or ahead, not both")
        arguments = {"rate_hz": rate_hz, "ahead": ahead, "execute": execute}
        if wrong := [f"{name}={value}" for name, value in arguments.items() if value is not None and value <= 0]:
            raise ValueError(f"{', '.join(wrong)} has to be positive")
        self.client, self.rate_hz, self.ahead, self.execute = client, rate_hz, ahead, execute
        self.latency = self.waited = 0.0
        self._thread = ThreadPoolExecutor(1, "openvla-chunks")
        self._now = 0
        self._words: str | None = None
        self._playing: tuple[NDArray[np.float64], int, int] = NOTHING  # the chunk, its step of request, its end
        self._coming: tuple[Future[NDArray[np.float64]], int] | None = None

    def act(
        self,
        image: Picture | Mapping[str, Picture],
        instruction: str,
        unnorm_key: str | None = None,
        deadline_ms: float | None = None,
        proprio: Sequence[float] | NDArray[np.floating] | None = None,
    ) -> NDArray[np.float64]:
        """The action [D] for the present step. Call this once for each action that the robot executes.

        Arguments and errors are those of `Client.act`. If a request fails while there are actions left to play, it is
        repeated with the newest picture.
        """
        if instruction != self._words:
            self.reset()
        self._words, first = instruction, self._playing is NOTHING
        while True:
            chunk, requested_at, until = self._playing
            left = requested_at + len(chunk) - self._now
            if self._coming and left > 0 and _failed(self._coming[0]):
                self._coming = None
            if self._coming is None and self._now >= until - self._lead(len(chunk)):
                # packed here, because the caller may overwrite its picture during the request
                message = _question(image, instruction, unnorm_key, deadline_ms, proprio, chunk=True)
                self._coming = self._thread.submit(self._answer, message, time.monotonic()), self._now
            if left <= 0 or (self._now >= until and self._coming and _arrived(self._coming[0])):
                self._turn(first)
            else:
                self._now += 1
                return chunk[self._now - 1 - requested_at]

    def reset(self) -> None:
        """Drop all planned actions, for a new episode."""
        self._playing, self._coming, self._words = NOTHING, None, None

    def close(self) -> None:
        """Wait for a pending answer; the client stays open."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _turn(self, first: bool) -> None:
        """Wait for the requested chunk, and start to play it."""
        assert self._coming is not None
        (answer, requested_at), self._coming = self._coming, None
        began = time.monotonic()
        chunk = answer.result()
        self.waited += 0.0 if first else time.monotonic() - began
        ends = requested_at + len(chunk)
        self._playing = chunk, requested_at, min(ends, self._now + (self.execute or len(chunk)))

    def _lead(self, length: int) -> int:
        """How many actions before the end of a chunk the next one is requested; fewer than the chunk has."""
        wanted = self.ahead or math.ceil(self.latency * (self.rate_hz or 0))
        return max(0, min(wanted, length - 1))

    def _answer(self, message: bytes, began: float) -> NDArray[np.float64]:
        chunk = self.client._answer(message)
        self.latency = time.monotonic() - began
        return chunk


def _arrived(answer: Future[Any]) -> bool:
    return answer.done() and answer.exception() is None


def _failed(answer: Future[Any]) -> bool:
    return answer.done() and answer.exception() is not None


def _question(
    image: Any, instruction: str, unnorm_key: Any, deadline_ms: Any, proprio: Any, chunk: bool = False
) -> bytes:
    pictures = image if isinstance(image, Mapping) else {"image": image}
    fields: dict[str, Any] = {name: _packed(picture) for name, picture in pictures.items()}
    fields["instruction"] = instruction
    state = None if proprio is None else np.asarray(proprio, np.float64).tolist()
    optional = {"unnorm_key": unnorm_key, "deadline_ms": deadline_ms, "proprio": state, "chunk": chunk or None}
    return msgpack.packb(fields | {name: value for name, value in optional.items() if value is not None})


def _packed(picture: Picture) -> Any:
    if isinstance(picture, bytes):
        return picture
    pixels = np.ascontiguousarray(picture)
    return {"data": pixels.tobytes(), "dtype": pixels.dtype.str, "shape": list(pixels.shape)}
