"""Bytes from the network -> a policy's request. All input is untrusted, and no pickle is ever read."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openvla_lightning.data.images import decode
from openvla_lightning.processor.gate import accepted
from openvla_lightning.serve.errors import Refused
from openvla_lightning.statistics import UnknownDatasetError, choose_key
from openvla_lightning.types import Observation, key_of

OPTIONAL = ("proprio", "unnorm_key", "deadline_ms", "chunk")
MOST_NUMBERS = 1000
"""Largest number of values in a proprioceptive state."""
MAX_WORDS = 1000
"""Longest instruction, in characters."""
MAX_ASPECT = 4
"""Largest ratio of an image's sides, because preprocessing may pad to a square of the longer side."""
UINT8 = ("|u1", "<u1", ">u1", "u1", "uint8")
STATE_DTYPES = ("<f4", "<f8", "<i4", "<i8")
"""Allowed dtypes of a state that is an array of json_numpy."""
OFT_NAMES = {"full_image": "image", "state": "proprio"}
"""Names in requests of OpenVLA-OFT's client -> ours; those of wrist cameras are the same."""


@dataclass(frozen=True)
class Question:
    """One robot's request for an action or a chunk.

    Attributes:
        observation: the observation, with images resized to the model's size, uint8 [S, S, 3].
        unnorm_key: dataset whose units to use; None: the policy's.
        deadline_ms: time after which the robot does not need the answer; None: the server's deadline.
        chunk: whether the whole chunk is requested, not only the first action.
        encoded: whether the request was doubly encoded (the released form), so that the answer must be, too.
        oft: whether OpenVLA-OFT's client asks, which expects a list of arrays.
    """

    observation: Observation
    unnorm_key: str | None = None
    deadline_ms: float | None = None
    chunk: bool = False
    encoded: bool = False
    oft: bool = False


class Reader:
    """Reads requests; its methods are thread-safe.

    Args:
        resize: an image of any size -> uint8 [S, S, 3], the first step of the policy's preprocessing.
        norm_stats: unnorm_key -> statistics of the policy.
        max_pixels: largest image.
        views: the policy's views; each has its own key (see `types.key_of`).
        proprio: whether the policy needs the robot's state.
    """

    def __init__(
        self,
        resize: Callable[[Image.Image | NDArray[np.uint8]], NDArray[np.uint8]],
        norm_stats: Mapping[str, Any],
        max_pixels: int,
        views: Sequence[str] = ("primary",),
        proprio: bool = False,
    ) -> None:
        self.resize, self.norm_stats, self.max_pixels = resize, norm_stats, max_pixels
        self.images = {key_of(view): view for view in views}
        self.needed = {*self.images, "instruction", *(["proprio"] if proprio else [])}

    def from_json(self, body: bytes) -> Question:
        """Read a request of the released client: json_numpy, or `{"encoded": "<json_numpy>"}`.

        OpenVLA-OFT's client names its pictures `full_image` and `..._wrist_image` and the state `state`; it always
        expects the whole chunk, and sends pictures that a policy of fewer views does not read.

        Raises:
            Refused: 400 for other contents, 422 for a field that is not valid, 413 for too many pixels.
        """
        fields = _json(body)
        if encoded := isinstance(fields, dict) and "encoded" in fields:
            if set(fields) != {"encoded"} or not isinstance(fields["encoded"], str):
                raise Refused(400, "bad_request", '"encoded" stands alone, and is a string of JSON')
            fields = _json(fields["encoded"])
        if isinstance(fields, dict) and "full_image" in fields:
            read = {name: value for name, value in fields.items() if "wrist" not in name or name in self.images}
            ours = {OFT_NAMES.get(name, name): value for name, value in read.items()}
            if len(ours) < len(read):
                raise Refused(400, "bad_request", f"a request has either {' and '.join(OFT_NAMES)}, or our names")
            return replace(self._question({**ours, "chunk": True}, encoded), oft=True)
        return self._question(fields, encoded)

    def from_msgpack(self, message: bytes) -> Question:
        """Read a message of the WebSocket.

        Raises:
            Refused: as `from_json`.
        """
        try:
            fields = msgpack.unpackb(message)
        except Exception as error:  # msgpack has six kinds, and no common base
            raise Refused(400, "bad_request", f"not a msgpack message: {type(error).__name__}") from None
        return self._question(fields, False)

    def from_fields(self, fields: Mapping[str, Any]) -> Question:
        """Read fields that another protocol has converted to our names.

        Raises:
            Refused: as `from_json`.
        """
        return self._question(dict(fields), False)

    def _question(self, fields: Any, encoded: bool) -> Question:
        if not isinstance(fields, dict):
            raise Refused(400, "bad_request", 'expected an object {"image": ..., "instruction": ...}')
        if not self.needed <= set(fields) or not set(fields) <= {*self.needed, *OPTIONAL}:
            optional = ", ".join(name for name in OPTIONAL if name not in self.needed)
            known = f"{', '.join(sorted(self.needed))}, and if wanted {optional}"
            raise Refused(400, "bad_request", f"expected the fields {known}; got {_shown(sorted(map(str, fields)))}")
        instruction = _text(fields["instruction"], "instruction")
        key = fields.get("unnorm_key")
        if key is not None:
            key = self._key(_text(key, "unnorm_key"))
        deadline = fields.get("deadline_ms")
        if deadline is not None and (
            isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline < 1e9
        ):
            raise Refused(422, "wrong_deadline", f"deadline_ms is a positive number, not {_shown(deadline)}")
        if not isinstance(chunk := fields.get("chunk", False), bool):
            raise Refused(422, "wrong_chunk", f"chunk is true or false, not {_shown(chunk)}")
        images = {view: self._image(fields[name]) for name, view in self.images.items()}
        proprio = None if fields.get("proprio") is None else _numbers(fields["proprio"])
        return Question(Observation(images, instruction, proprio), key, deadline, chunk, encoded)

    def _key(self, key: str) -> str:
        try:
            return choose_key(self.norm_stats, key)
        except UnknownDatasetError as error:
            raise Refused(422, "unknown_unnorm_key", str(error), known=list(self.norm_stats)) from None

    def _image(self, value: Any) -> NDArray[np.uint8]:
        if isinstance(value, str):
            value = _base64(value)
        if isinstance(value, bytes):
            return self.resize(self._decoded(value))
        if isinstance(value, dict) and "__numpy__" in value:
            return self.resize(self._array(_base64(value["__numpy__"]), value))
        if isinstance(value, dict) and "data" in value:
            return self.resize(self._array(value["data"], value))
        raise _wrong_image(f"got {type(value).__name__}")

    def _array(self, data: Any, value: dict[str, Any]) -> NDArray[np.uint8]:
        dtype, shape = value.get("dtype", "uint8"), value.get("shape")
        if dtype not in UINT8:
            raise _wrong_image(f"got dtype {_shown(dtype)}")
        if not isinstance(shape, list) or len(shape) != 3 or any(type(side) is not int for side in shape):
            raise _wrong_image(f"got shape {_shown(shape)}")
        height, width, channels = shape
        if channels != 3:
            raise _wrong_image(f"got shape {_shown(shape)}")
        self._check_size(width, height)
        if not isinstance(data, bytes) or len(data) != height * width * 3:
            raise _wrong_image(f"its data do not fill the shape {shape}")
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)

    def _decoded(self, data: bytes) -> NDArray[np.uint8]:
        try:
            picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        except Image.DecompressionBombError:
            raise self._too_large("those of its header") from None
        except Exception:  # damaged bytes raise any error in Pillow
            raise _wrong_image("its bytes are neither") from None
        self._check_size(*picture.size)  # from the header, before anything is decoded
        try:
            pixels = decode(data)  # decoded as in training
        except Exception:
            raise _wrong_image(f"the {picture.format} is damaged") from None
        if pixels.shape[1::-1] != picture.size:
            raise _wrong_image(f"the {picture.format} says two sizes of itself")
        return pixels

    def _check_size(self, width: int, height: int) -> None:
        if min(width, height) < 1:
            raise _wrong_image(f"it is {_shown(width)} x {_shown(height)}")
        if width * height > self.max_pixels:
            raise self._too_large(f"{_shown(width)} x {_shown(height)}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise _wrong_image(f"it is {width} x {height}, more than {MAX_ASPECT} times as long as wide")

    def _too_large(self, size: str) -> Refused:
        message = (
            f"an image may have {self.max_pixels} pixels, not {size}; scale it: the model sees a smaller one anyway"
        )
        return Refused(413, "too_large", message)


def _json(text: bytes | str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "bad_request", f"not JSON: {_shown(str(error))}") from None


def _base64(text: Any) -> bytes:
    """Decode base64, also with line breaks (RFC 2045) or as a browser's data URL."""
    if not isinstance(text, str):
        return b""
    head, comma, rest = text.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        text = rest
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise _wrong_image("its text is not base64") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Refused(422, f"wrong_{name}", f"{name} is a text, not {_shown(value)}")
    if len(value) > MAX_WORDS:
        raise Refused(422, f"wrong_{name}", f"{name} may have {MAX_WORDS} characters, not {len(value)}")
    try:
        return accepted(value)
    except ValueError as error:
        raise Refused(422, f"wrong_{name}", f"{name}: {error}") from None


def _listed(value: Any) -> Any:
    """The numbers of a json_numpy array [P]; any other value as it is."""
    if not isinstance(value, dict) or value.get("dtype") not in STATE_DTYPES:
        return value
    dtype = np.dtype(value["dtype"])
    try:
        data = base64.b64decode(value.get("__numpy__", ""), validate=True)
    except (TypeError, ValueError):
        return value
    fills = value.get("shape") == [len(data) // dtype.itemsize] and len(data) % dtype.itemsize == 0
    return np.frombuffer(data, dtype).tolist() if fills else value


def _numbers(value: Any) -> NDArray[np.float32]:
    """Proprioception: a list of finite numbers, or a json_numpy array of them."""
    value = _listed(value)
    known = isinstance(value, list) and 0 < len(value) <= MOST_NUMBERS
    if not known or any(isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < 1e30 for x in value):
        raise Refused(422, "wrong_proprio", f"proprio is a list of finite numbers, not {_shown(value)}")
    return np.array(value, np.float32)


def _wrong_image(detail: str) -> Refused:
    expected = "image is a uint8 array [H, W, 3] in the form of json_numpy, or a PNG or JPEG (base64 in JSON)"
    return Refused(422, "wrong_image", f"{expected}; {detail}")


def _shown(value: Any) -> str:
    """A short, safe representation of a value that was sent."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
