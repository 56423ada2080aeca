"""A robot's side of `openvla_lightning.serve`. Needs numpy, msgpack and websockets; no torch.

with Client("http://127.0.0.1:8000") as policy:
    action = policy.act(image, "pick up the can")
    actions = policy.act_chunk({"image": image, "wrist_image": wrist}, "pick up the can", proprio=state)
"""

import json
from collections.abc import Mapping, Sequence
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
        return self._ask(image, instruction, unnorm_key, deadline_ms, proprio, "action")

    def act_chunk(
        self,
        image: Picture | Mapping[str, Picture],
        instruction: str,
        unnorm_key: str | None = None,
        deadline_ms: float | None = None,
        proprio: Sequence[float] | NDArray[np.floating] | None = None,
    ) -> NDArray[np.float64]:
        """Ask for all actions that the policy gives at a time: float64 [T, D]; everything else as `act`."""
        return self._ask(image, instruction, unnorm_key, deadline_ms, proprio, "actions")

    def _ask(
        self, image: Any, instruction: str, unnorm_key: Any, deadline_ms: Any, proprio: Any, wanted: str
    ) -> NDArray[np.float64]:
        pictures = image if isinstance(image, Mapping) else {"image": image}
        fields: dict[str, Any] = {name: _packed(picture) for name, picture in pictures.items()}
        fields["instruction"] = instruction
        state = None if proprio is None else np.asarray(proprio, np.float64).tolist()
        optional = {"unnorm_key": unnorm_key, "deadline_ms": deadline_ms, "proprio": state}
        fields |= {name: value for name, value in optional.items() if value is not None}
        if wanted == "actions":
            fields["chunk"] = True
        answer = self._exchange(msgpack.packb(fields))
        if "error" in answer:
            raise ServerError(answer["error"])
        return np.array(answer[wanted], np.float64)

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


def _packed(picture: Picture) -> Any:
    if isinstance(picture, bytes):
        return picture
    pixels = np.ascontiguousarray(picture)
    return {"data": pixels.tobytes(), "dtype": pixels.dtype.str, "shape": list(pixels.shape)}
