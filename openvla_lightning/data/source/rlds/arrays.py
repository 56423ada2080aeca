"""Images that are stored as plain numbers (`tfds.features.Tensor`, uint8) instead of as encoded pictures."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Stored = Literal["varint", "zlib", "bytes"]


@dataclass(frozen=True)
class Layout:
    """Layout of an image's numbers in a record.

    Attributes:
        shape: height, width, channels.
        stored: `varint` (protocol buffers' encoding of integers), `zlib` (compressed) or `bytes`.
    """

    shape: tuple[int, int, int]
    stored: Stored

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Layout":
        """The inverse of `dataclasses.asdict`, from JSON."""
        height, width, channels = said["shape"]
        return cls((height, width, channels), said["stored"])

    def pixels(self, content: bytes) -> NDArray[np.uint8]:
        """Image uint8 [H, W, C] from the bytes in a record.

        Raises:
            ValueError: the number of values does not fit the shape.
        """
        if self.stored == "varint":
            numbers = _from_varints(np.frombuffer(content, np.uint8))
        else:
            try:
                numbers = np.frombuffer(zlib.decompress(content) if self.stored == "zlib" else content, np.uint8)
            except zlib.error as error:
                raise ValueError(f"an image stored with ZLIB cannot be unpacked: {error}") from None
        if numbers.size != np.prod(self.shape):
            raise ValueError(f"an image stored as numbers has {numbers.size} of them, not {list(self.shape)}")
        return numbers.reshape(self.shape)

    def encode(self, content: bytes) -> bytes:
        """The same image as a PPM file, or PGM if it is grey."""
        pixels = self.pixels(content)
        height, width, channels = self.shape
        kind, pixels = (b"P5", pixels) if channels == 1 else (b"P6", pixels[..., :3])
        return b"%s\n%d %d\n255\n" % (kind, width, height) + pixels.tobytes()

    def spans(self, record: bytes, start: int, name: str, steps: int) -> NDArray[np.int64]:
        """Offset and length in the file of each step's numbers, int64 [steps, 2], for `varint`.

        Args:
            record: the serialised trajectory.
            start: offset of the record in the file.
            name: name of the feature in the record.
            steps: number of steps in the trajectory.

        Raises:
            ValueError: the record holds another number of values.
        """
        begin, end = _packed(record, name)
        ends = np.flatnonzero(np.frombuffer(record[begin:end], np.uint8) < 128) + 1
        size = int(np.prod(self.shape))
        if len(ends) != steps * size:
            raise ValueError(f"{name} holds {len(ends)} numbers, not {steps} images of {list(self.shape)}")
        bounds = np.append(0, ends[size - 1 :: size]) + begin + start
        return np.stack([bounds[:-1], np.diff(bounds)], axis=1)


def layout_of(feature: Mapping[str, Any], key: str) -> Layout | None:
    """Layout of the images of a feature in features.json; None for encoded pictures.

    Raises:
        ValueError: the feature is no image.
    """
    if "tensor" not in feature:
        return None
    tensor = feature["tensor"]
    shape = [int(length) for length in tensor.get("shape", {}).get("dimensions", ())]
    dtype, encoding = tensor.get("dtype", "?"), str(tensor.get("encoding", "none")).lower()
    if dtype in ("string", "object") and not shape:
        return None  # the dataset's author encoded the pictures
    if len(shape) == 2:
        shape = [*shape, 1]
    if dtype != "uint8" or len(shape) != 3 or min(shape) < 1 or shape[2] not in (1, 3, 4):
        raise ValueError(
            f"observation/{key} is {dtype} {shape}: an image is stored as tfds.features.Image, or as uint8 "
            "[height, width, 3] of a fixed size"
        )
    stored: dict[str, Stored] = {"none": "varint", "zlib": "zlib", "bytes": "bytes"}
    return Layout((shape[0], shape[1], shape[2]), stored[encoding])


def observation_features(features: Mapping[str, Any]) -> Mapping[str, Any]:
    """The features of each key under `observation` in features.json; empty if there are none.

    Both forms of tfds are supported: that of the file, and that of `FeatureConnector.to_json`.
    """
    top = features.get("featuresDict") or features.get("content") or {}
    steps = top.get("features", {}).get("steps", {}) if isinstance(top, Mapping) else {}
    step = steps.get("sequence", {}).get("feature", {}) if isinstance(steps, Mapping) else {}
    inner = step.get("featuresDict", {}).get("features", {}).get("observation", {})
    return inner.get("featuresDict", {}).get("features", {})


def _from_varints(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode numbers 0..255 from one or two bytes each: seven bits per byte, low bits first."""
    ends = np.flatnonzero(content < 128)
    before = content[np.maximum(ends - 1, 0)]
    two = (before >= 128) & (ends > 0)
    return np.where(two, (before & 0x7F) | (content[ends] << 7), content[ends]).astype(np.uint8)


def _packed(record: bytes, name: str) -> tuple[int, int]:
    """Bounds of the packed integers of feature `name` in a serialised `tf.train.Example`."""
    wanted = name.encode()
    for features in _fields(record, 0, len(record), 1):
        for entry in _fields(record, *features, 1):
            if not any(record[begin:end] == wanted for begin, end in _fields(record, *entry, 1)):
                continue
            for value in _fields(record, *entry, 2):
                for integers in _fields(record, *value, 3):
                    for packed in _fields(record, *integers, 1):
                        return packed
    raise ValueError(f"{name} is not stored as integers in one piece")


def _fields(record: bytes, begin: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """Bounds of the contents of all length-delimited fields with this number in a protocol buffer message."""
    while begin < end:
        tag, begin = _varint(record, begin)
        kind = tag & 7
        if kind == 0:
            _, begin = _varint(record, begin)
        elif kind in (1, 5):
            begin += 8 if kind == 1 else 4
        elif kind == 2:
            length, begin = _varint(record, begin)
            if tag >> 3 == number:
                yield begin, begin + length
            begin += length
        else:
            raise ValueError("the record is no tf.train.Example")


def _varint(record: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = record[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
