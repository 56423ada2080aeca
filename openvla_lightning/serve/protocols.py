"""Our WebSocket protocol and those of other projects' clients; their packages are not imported.

`openpi` (github.com/Physical-Intelligence/openpi, packages/openpi-client): the server first sends its metadata; then
each observation is answered with `{"actions": [T, D]}`. Arrays are maps with the key `b"__ndarray__"`; errors are
text frames.

`vla_eval` (the package vla-eval, `vla_eval.connection`): messages are `{type, payload, seq, timestamp}`. HELLO is
answered with HELLO, an OBSERVATION with an ACTION or an ERROR of the same `seq`. Arrays have the key `__ndarray__`,
images `__image__`. Its benchmarks expect the gripper as -1 (open) and 1 (closed).
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

import openvla_lightning
from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.reading import MOST_NUMBERS, Question, Reader

STATES = ("i", "u", "f")
"""Allowed kinds of dtypes for a robot's state."""
WORDS = ("prompt", "task_description", "instruction", "task")
FIRST_VIEWS = ("image", "exterior_image_1_left", "base_0_rgb", "cam_high")
"""Other projects' names of the policy's first view."""
WRISTS = ("wrist_image", "wrist_image_left", "left_wrist_0_rgb", "wrist")
VERSION = 1
"""Version of the harness' protocol."""


class OwnProtocol:
    """Our own protocol: each message is one msgpack map, and so is the answer (see `Reader.from_msgpack`)."""

    name = "ws"

    def __init__(self, reader: Reader, info: Callable[[], Mapping[str, Any]]) -> None:
        self.reader, self.info = reader, info

    def greeting(self) -> bytes | None:
        """The message that is sent before any request; None: no message."""
        return None

    def reply(self, message: bytes | str) -> bytes | str | None:
        """The answer to a message that asks for no action; None if it asks for one, or needs no answer."""
        return None

    def asks(self, message: bytes | str) -> bool:
        """Whether a message asks for an action."""
        return True

    def read(self, message: bytes | str) -> Question:
        """The request; raises Refused if it is not valid."""
        return self.reader.from_msgpack(message if isinstance(message, bytes) else b"")

    def held(self) -> NDArray[np.float64] | None:
        """A remaining action to execute before the policy is asked again; None: there is none."""
        return None

    def answer(self, question: Question, action: NDArray[np.float64], seconds: float) -> bytes | str:
        """The message with an action [D], or a chunk [T, D]."""
        return msgpack.packb({"actions" if question.chunk else "action": action.tolist()})

    def refusal(self, error: Refused) -> bytes | str:
        """The message that says why there is no action."""
        return msgpack.packb(error.body)


class OpenPi(OwnProtocol):
    """The protocol of `openpi_client.websocket_client_policy.WebsocketClientPolicy`."""

    name = "openpi"

    def greeting(self) -> bytes:
        """Facts about the policy, as far as they are plain numbers and words."""
        known = self.info()
        keys = ("unnorm_key", "action_dim", "action_chunk", "cameras", "proprio")
        return msgpack.packb({key: known[key] for key in keys})

    def read(self, message: bytes | str) -> Question:
        """An observation: `observation/image`, `observation/wrist_image`, `observation/state`, `prompt`, or nested."""
        return self.reader.from_fields({**observed(self.reader, unpacked(message)), "chunk": True})

    def answer(self, question: Question, action: NDArray[np.float64], seconds: float) -> bytes:
        """All actions of the chunk, and the time that they took."""
        return msgpack.packb({"actions": _array(action, b""), "server_timing": {"infer_ms": 1000 * seconds}})

    def refusal(self, error: Refused) -> str:
        """A text frame, which this client treats as an error."""
        return f"{error.status} {error.code}: {error.message}"


class VlaEval(OwnProtocol):
    """The protocol of `vla_eval.connection.Connection`. Chunks are executed to their end, as in our own evaluations."""

    name = "vla_eval"

    def __init__(self, reader: Reader, info: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(reader, info)
        self.seq = 0
        self.waiting: list[NDArray[np.float64]] = []
        self.kind: str | None = None
        self.payload: Any = None

    def asks(self, message: bytes | str) -> bool:
        """Parse a message; an observation asks for an action."""
        self.kind, self.payload = None, None
        fields = unpacked(message)
        kind, seq = fields.get("type"), fields.get("seq")
        if not isinstance(seq, int) or isinstance(seq, bool) or abs(seq) >= 2**63:
            raise Refused(400, "bad_request", "a message holds type, payload, seq and timestamp; seq is a number")
        self.seq = seq
        if not isinstance(kind, str) or not isinstance(fields.get("payload"), dict):
            raise Refused(400, "bad_request", "a message holds type, payload, seq and timestamp; payload is a map")
        if kind not in ("hello", "observation", "episode_start", "episode_end", "error"):
            raise Refused(400, "bad_request", f"unknown message type {kind[:40]!a}")
        self.kind, self.payload = kind, fields["payload"]
        if kind in ("episode_start", "episode_end"):
            self.waiting.clear()
        return kind == "observation"

    def reply(self, message: bytes | str) -> bytes | None:
        """HELLO is answered with facts about the policy; other messages get no answer here."""
        if self.kind != "hello":
            return None
        known = self.info()
        payload: dict[str, Any] = {
            "harness_version": f"openvla_lightning {openvla_lightning.__version__}",
            "protocol_version": VERSION,
            "model_server": "openvla_lightning",
            "capabilities": {},
        }
        wanted = {"send_wrist_image": "wrist" in known["cameras"], "send_state": bool(known["proprio"])}
        payload["observation_params"] = {name: True for name, needed in wanted.items() if needed}
        if known["action_dim"] == 7:
            payload["action_spec"] = {
                "position": {"name": "position", "dims": 3, "format": "delta_xyz"},
                "gripper": {"name": "gripper", "dims": 1, "format": "binary_close_positive", "range": [-1, 1]},
            }
        return self._packed("hello", payload)

    def read(self, message: bytes | str) -> Question:
        """An observation: `images` by name, the first of them the policy's; `task_description`; `states`."""
        images = self.payload.get("images")
        pictures = dict(images) if isinstance(images, dict) and not _is_array(images) else {"image": images}
        state = self.payload.get("states", self.payload.get("state"))
        flat = {**pictures, **{name: self.payload[name] for name in WORDS if name in self.payload}}
        flat |= {} if state is None else {"state": state}
        return self.reader.from_fields({**observed(self.reader, flat), "chunk": True})

    def held(self) -> NDArray[np.float64] | None:
        """The chunk's next action."""
        return self.waiting.pop(0) if self.waiting else None

    def answer(self, question: Question, action: NDArray[np.float64], seconds: float) -> bytes:
        """The next action, with the gripper in the harness' convention; the rest of a chunk is kept."""
        if action.ndim == 2:
            action, self.waiting = action[0], [*action[1:]]
        said = action.astype(np.float32)
        if len(said) == 7:
            said[-1] = -1.0 if said[-1] > 0.5 else 1.0
        return self._packed("action", {"actions": _array(said, "")})

    def refusal(self, error: Refused) -> bytes:
        """An ERROR with the observation's number."""
        return self._packed("error", {"error": f"{error.code}: {error.message}", **error.body["error"]})

    def _packed(self, kind: str, payload: Mapping[str, Any]) -> bytes:
        return msgpack.packb({"type": kind, "payload": payload, "seq": self.seq, "timestamp": time.time()})


PROTOCOLS: dict[str, type[OwnProtocol]] = {"/ws": OwnProtocol, "/": OpenPi, "/openpi": OpenPi, "/vla_eval": VlaEval}
"""Address -> its protocol. openpi's client only uses the root."""


def unpacked(message: bytes | str) -> dict[Any, Any]:
    """A msgpack map.

    Raises:
        Refused: 400, if it is not one.
    """
    if not isinstance(message, bytes):
        raise Refused(400, "bad_request", "not a msgpack message: a text")
    try:
        fields = msgpack.unpackb(message)
    except Exception as error:  # msgpack has six kinds, and no common base
        raise Refused(400, "bad_request", f"not a msgpack message: {type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise Refused(400, "bad_request", "a message is a map")
    return fields


def observed(reader: Reader, fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Another project's observation under our names, with only the policy's inputs.

    Raises:
        Refused: 400, an input is missing (the message lists what was sent); 422, a state is no list of numbers.
    """
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = value if isinstance(value, dict) and not _is_array(value) else None
        for key, child in (inner if inner is not None and name in ("observation", "images") else {name: value}).items():
            if isinstance(key, str):
                flat[key.removeprefix("observation/").removeprefix("observation.").removeprefix("images.")] = child
    observation = {key: _image(flat[key]) for key in reader.images if key in flat}
    pictures = [key for key, value in flat.items() if _is_array(value) or isinstance(value, bytes)]
    for key in reader.images.keys() - observation.keys():
        known = {"image": FIRST_VIEWS, "wrist_image": WRISTS}.get(key, ())
        name = next((name for name in known if name in flat), None)
        if name is None and key == "image":
            name = next((name for name in pictures if "wrist" not in name and "state" not in name), None)
        if name is None and key == "wrist_image":
            name = next((name for name in pictures if "wrist" in name), None)
        if name is not None:
            observation[key] = _image(flat[name])
    if (words := next((name for name in WORDS if name in flat), None)) is not None:
        observation["instruction"] = _words(flat[words])
    if "proprio" in reader.needed and (state := next((n for n in ("state", "proprio", "states") if n in flat), None)):
        observation["proprio"] = _state(flat[state])
    if lacking := sorted(reader.needed - observation.keys()):
        there = ", ".join(sorted(map(ascii, flat)))[:200]
        raise Refused(400, "bad_request", f"the policy needs {', '.join(lacking)}; the observation holds {there}")
    return observation


def _is_array(value: Any) -> bool:
    return isinstance(value, dict) and bool({b"__ndarray__", "__ndarray__", "__image__"} & value.keys())


def _part(value: Mapping[Any, Any], name: str) -> Any:
    return value.get(name.encode(), value.get(name))


def _image(value: Any) -> Any:
    """An array or a file in the form of `Reader`; other values are passed unchanged, and `Reader` refuses them."""
    if not _is_array(value):
        return value
    if _part(value, "format") in ("png", "jpeg"):
        return _part(value, "data")
    shape, dtype = _part(value, "shape"), _part(value, "dtype")
    shape = list(shape) if isinstance(shape, list | tuple) else shape
    return {"data": _part(value, "data"), "dtype": dtype, "shape": shape}


def _words(value: Any) -> Any:
    """One text, also from a list with one element."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _state(value: Any) -> Any:
    if isinstance(value, dict) and (b"__npgeneric__" in value):
        return [_part(value, "data")]
    if not _is_array(value):
        return value
    dtype, data, shape = (_part(value, name) for name in ("dtype", "data", "shape"))
    problem = Refused(422, "wrong_proprio", "a state is a row of numbers")
    try:
        dtype = np.dtype(dtype if isinstance(dtype, str) and len(dtype) < 5 else "V")
        if dtype.kind not in STATES or not isinstance(data, bytes) or len(data) > MOST_NUMBERS * dtype.itemsize:
            raise problem
        numbers = np.frombuffer(data, dtype)
    except (TypeError, ValueError):
        raise problem from None
    sides = [side for side in shape if side != 1] if isinstance(shape, list | tuple) else None
    if sides is None or sides not in ([len(numbers)], []):
        raise problem
    return numbers.astype(np.float64).tolist()


def _array(values: NDArray[Any], key: str | bytes) -> dict[Any, Any]:
    """An array in the form of the client's codec, with bytes or texts as keys."""
    described = {"__ndarray__": True, "data": values.tobytes(), "dtype": values.dtype.str, "shape": list(values.shape)}
    return {name.encode(): part for name, part in described.items()} if isinstance(key, bytes) else described
