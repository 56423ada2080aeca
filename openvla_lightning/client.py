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
from urllib.request import Request, urlopen

import msgpack
import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

Picture = NDArray[np.uint8] | bytes


class ServerError(RuntimeError):
    """The server's answer when there is no action.

    Attributes:
        status: HTTP status code; 504: too late, 503: too busy or stopping, 4xx: the request is wrong.
        code: the same in a word.
        facts: everything the server said.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(facts["message"])
        self.status, self.code, self.facts = facts["status"], facts["code"], facts


class Client:
    """Asks a server for actions over one WebSocket, which is opened when first needed and again when lost.

    For one thread; further threads or cameras take further clients.

    Args:
        url: of the server.
        token: the server's, if it asks for one.
        timeout: seconds to wait for anything.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 10.0) -> None:
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
            image: uint8 [H, W, 3], RGB; or the bytes of a PNG or JPEG. For a policy with several views all of them, by
                name: `image`, `wrist_image`, `image@-1` (one step earlier); `info` says which.
            instruction: what to do.
            unnorm_key: whose units; None: as the server was told.
            deadline_ms: after how long the answer is of no use; None: as the server was told.
            proprio: [P], what the robot feels of itself, in its own units, for a policy that is told it.

        Returns:
            float64 [D], in the dataset's units, the gripper (1: open) last.

        Raises:
            ServerError: when the server refuses.
            ConnectionError: when there is no server, or it went away.
            TimeoutError: when nothing came in time.
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
        """Ask for all actions that the policy gives at a time: float64 [T, D]; everything else as `act`."""
        return self._answer(_question(image, instruction, unnorm_key, deadline_ms, proprio, chunk=True))

    def info(self) -> dict[str, Any]:
        """What acts there: statistics, cameras, limits, versions."""
        with urlopen(Request(f"{self.url}/info", headers=self._headers), timeout=self.timeout) as response:
            return json.load(response)

    def close(self) -> None:
        """Hang up."""
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
            self.close()  # else a late answer would be taken for that to the next question
            if isinstance(error, WebSocketException | ConnectionError):
                raise ConnectionError(f"no answer from {self.url}: {error}") from error
            raise


NOTHING: tuple[NDArray[np.float64], int, int] = (np.empty((0, 0)), 0, 0)


class ChunkPlayer:
    """Plays a server's chunks action by action, and asks for the next chunk while the robot still executes this one.

    A chunk's first action belongs to the picture it was asked with. When the chunk arrives some steps have passed, in
    which the robot executed the end of the chunk before; so it goes on with the action for now, and those before are
    dropped. A robot that moves by changes of its pose would otherwise make them twice.

    Where an answer is late, the rest of the chunk before is played, if it has one, and then `act` waits. Other words
    than before drop everything and ask anew.

    Args:
        client: which nobody else uses meanwhile.
        rate_hz: actions a second that the robot executes: the next chunk is asked for as many of them before this one
            ends as the last answer took.
        ahead: instead of `rate_hz`, how many actions before the end that is.
        execute: how many actions of a chunk are executed at most; None: all that are left of it when it begins.

    Attributes:
        latency: seconds that the last answer took.
        waited: seconds in which the robot had nothing to do, first chunks apart.

    Raises:
        ValueError: for neither or both of `rate_hz` and `ahead`, or a number that is not positive.
    """

    def __init__(
        self, client: Client, rate_hz: float | None = None, ahead: int | None = None, execute: int | None = None
    ) -> None:
        if (rate_hz is None) == (ahead is None):
            raise ValueError("give rate_hz, how many actions a second the robot executes, or ahead, not both")
        given = {"rate_hz": rate_hz, "ahead": ahead, "execute": execute}
        if wrong := [f"{name}={value}" for name, value in given.items() if value is not None and value <= 0]:
            raise ValueError(f"{', '.join(wrong)} has to be positive")
        self.client, self.rate_hz, self.ahead, self.execute = client, rate_hz, ahead, execute
        self.latency = self.waited = 0.0
        self._thread = ThreadPoolExecutor(1, "openvla-chunks")
        self._now = 0
        self._words: str | None = None
        self._playing: tuple[NDArray[np.float64], int, int] = NOTHING  # when it was asked for, until when it is played
        self._coming: tuple[Future[NDArray[np.float64]], int] | None = None

    def act(
        self,
        image: Picture | Mapping[str, Picture],
        instruction: str,
        unnorm_key: str | None = None,
        deadline_ms: float | None = None,
        proprio: Sequence[float] | NDArray[np.floating] | None = None,
    ) -> NDArray[np.float64]:
        """The action [D] for now, to be called once for each action that the robot executes.

        Arguments and errors are those of `Client.act`. An answer that fails while there are actions left to play is
        asked for again, with what is seen then.
        """
        if instruction != self._words:
            self.reset()
        self._words, first = instruction, self._playing is NOTHING
        while True:
            chunk, asked, until = self._playing
            left = asked + len(chunk) - self._now
            if self._coming and left > 0 and _failed(self._coming[0]):
                self._coming = None
            if self._coming is None and self._now >= until - self._lead(len(chunk)):
                # packed here: the caller may fill its picture anew while the answer is under way
                message = _question(image, instruction, unnorm_key, deadline_ms, proprio, chunk=True)
                self._coming = self._thread.submit(self._answer, message, time.monotonic()), self._now
            if left <= 0 or (self._now >= until and self._coming and _arrived(self._coming[0])):
                self._turn(first)
            else:
                self._now += 1
                return chunk[self._now - 1 - asked]

    def reset(self) -> None:
        """Forget what was planned, for a new episode."""
        self._playing, self._coming, self._words = NOTHING, None, None

    def close(self) -> None:
        """Wait for the answer that is under way; the client stays open."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _turn(self, first: bool) -> None:
        """Wait for the chunk that is coming, and play it from now on."""
        assert self._coming is not None
        (answer, asked), self._coming = self._coming, None
        began = time.monotonic()
        chunk = answer.result()
        self.waited += 0.0 if first else time.monotonic() - began
        ends = asked + len(chunk)
        self._playing = chunk, asked, min(ends, self._now + (self.execute or len(chunk)))

    def _lead(self, length: int) -> int:
        """How many actions before the end of a chunk the next one is asked for: fewer than it has."""
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
