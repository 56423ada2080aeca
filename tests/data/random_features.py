"""Features of RLDS datasets drawn at random, each with what writes its values: images, actions, words, states."""

import io
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

F = tfds.features
BOMB_SIDE = 40_000
"""Pixels along a side that a header claims: more than any library unpacks."""


@dataclass
class Drawn:
    """A dataset and what is to be expected of it.

    Attributes:
        spec: its description, right or wrong.
        reader, options: arguments of the source and of the DataModule.
        notes: what was drawn, for whoever reads a failure.
        shades: split -> trajectory -> step -> grey level of its picture; None: black, or not to be compared.
        words: split -> trajectory -> step -> what may be said there.
        torn: a picture is whole at both ends and broken in between.
        damaged: the file that was damaged; an error names it.
        exact: nothing was damaged, so that everything can be compared with what was written.
    """

    root: Path
    spec: dict[str, Any] = field(default_factory=dict)
    reader: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shades: dict[str, list[list[int | None]]] = field(default_factory=dict)
    words: dict[str, list[list[str]]] = field(default_factory=dict)
    torn: bool = False
    damaged: str | None = None
    exact: bool = True


def file(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """An image file of an array."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, kind, **options)
    return written.getvalue()


def flat(shade: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def images(rng: random.Random, made: Drawn) -> tuple[Any, Callable[[random.Random, int], tuple[Any, int | None]]]:
    kind = rng.choice(
        ["jpeg"] * 4
        + ["png", "png", "fixed", "array", "zlib", "bytes", "text", "grey", "grey16", "rgba", "gif", "bmp", "webp"]
        + ["float", "flat", "two"]
    )
    height, width = rng.choice([(16, 24), (1, 1), (32, 32), (7, 50), (64, 16)])
    made.notes.append(f"images {kind} {height}x{width}")
    shape = (height, width, 3)
    odd = rng.choice([None] * 12 + ["absent", "some absent", "torn", "cut", "trailing", "noise", "bomb"])
    if kind in ("array", "zlib", "bytes", "float", "flat", "two"):
        odd = None
    if odd:
        made.notes.append(f"pictures {odd}")
    feature = {
        "fixed": F.Image(shape=shape, encoding_format="png"),
        "array": F.Tensor(shape=shape, dtype=np.uint8),
        "zlib": F.Tensor(shape=shape, dtype=np.uint8, encoding="zlib"),
        "bytes": F.Tensor(shape=shape, dtype=np.uint8, encoding="bytes"),
        "text": F.Text(),
        "float": F.Tensor(shape=shape, dtype=np.float32),
        "flat": F.Tensor(shape=(height * width,), dtype=np.uint8),
        "two": F.Tensor(shape=(height, width, 2), dtype=np.uint8),
        "png": F.Image(shape=(None, None, 3), encoding_format="png"),
    }.get(kind, F.Image(shape=(None, None, 3)))

    def stored(shade: int) -> Any:
        pixels = flat(shade, height, width)
        if kind in ("array", "zlib", "bytes"):
            return pixels
        if kind == "float":
            return pixels.astype(np.float32) / 255
        if kind == "flat":
            return pixels[..., 0].reshape(-1)
        if kind == "two":
            return pixels[..., :2].copy()
        if kind == "grey":
            return file(pixels[..., 0], "PNG")
        if kind == "grey16":
            return file(pixels[..., 0].astype(np.uint16) * 257, "PNG")
        if kind == "rgba":
            return file(np.concatenate([pixels, np.full((height, width, 1), 255, np.uint8)], axis=2), "PNG")
        form = {"jpeg": "JPEG", "text": "JPEG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP"}.get(kind, "PNG")
        return file(pixels, form)

    def encode(rng: random.Random, shade: int) -> tuple[Any, int | None]:
        whole = stored(shade)
        if odd == "absent" or (odd == "some absent" and rng.random() < 0.3):
            return b"", 0
        if odd in (None, "some absent") or rng.random() < 0.6:
            return whole, shade
        if odd == "torn":
            made.torn = True
            middle = len(whole) // 2
            return whole[:middle] + rng.randbytes(max(1, len(whole) // 6)) + whole[middle:], None
        if odd == "cut":
            return whole[: rng.randrange(1, len(whole))], None
        if odd == "noise":
            return rng.randbytes(rng.randrange(1, 200)), None
        if odd == "bomb":
            made.torn = True
            return _bomb(), None
        return whole + bytes(rng.choice([1, 14, 15, 96, 513])), shade

    return feature, encode


def _bomb() -> bytes:
    picture = bytearray(file(flat(0, 4, 4), "PNG"))
    picture[16:24] = BOMB_SIDE.to_bytes(4, "big") * 2  # the header's checksum is not what libraries stop at
    picture[29:33] = zlib.crc32(picture[12:29]).to_bytes(4, "big")
    return bytes(picture)


def actions(rng: random.Random, made: Drawn) -> tuple[Any, Callable[[random.Random, int], list[Any]]]:
    kind = rng.choice(["vector"] * 16 + ["nested"] * 4 + ["scalar", "matrix", "text", "bool", "empty"])
    dtype = rng.choice([np.float32, np.float32, np.float64, np.int32, np.int64, np.float16])
    dim = rng.choice([7, 7, 7, 1, 2, 6, 8, 14])
    odd = rng.choice([None] * 14 + ["nan", "inf", "huge", "constant", "zero", "gripper 850"])
    made.notes.append(f"actions {kind} {np.dtype(dtype).name} {dim} {odd or ''}".strip())
    if kind == "nested":
        made.spec["action"] = ["action/world_vector", "action/rotation_delta", "action/gripper"]
        parts = {"world_vector": 3, "rotation_delta": 3, "gripper": 1}
        feature: Any = F.FeaturesDict({name: F.Tensor(shape=(n,), dtype=np.float32) for name, n in parts.items()})
    else:
        shape = {"scalar": (), "matrix": (2, 4), "text": (), "empty": (0,)}.get(kind, (dim,))
        taken = {"text": np.object_, "bool": np.bool_}.get(kind, dtype)
        feature = F.Text() if kind == "text" else F.Tensor(shape=shape, dtype=taken)

    def act(rng: random.Random, length: int) -> list[Any]:
        numbers = np.random.default_rng(rng.randrange(2**32)).normal(size=(length, 7 if kind == "nested" else dim))
        numbers[:, -1] = np.random.default_rng(length).integers(0, 2, length)
        if odd in ("nan", "inf", "huge") and rng.random() < 0.5:
            value = {"nan": np.nan, "inf": np.inf, "huge": 1e30}[odd]
            numbers[rng.randrange(length), rng.randrange(numbers.shape[1])] = value
        if odd == "constant":
            numbers[:, 0] = 3.5
        if odd == "zero":
            numbers[:] = 0
        if odd == "gripper 850":
            numbers[:, -1] *= 850
        with np.errstate(all="ignore"):
            if kind == "nested":
                cuts = np.split(numbers.astype(np.float32), [3, 6], axis=1)
                return [dict(zip(parts, [cut[t] for cut in cuts], strict=True)) for t in range(length)]
            if kind == "text":
                return ["left"] * length
            if kind == "bool":
                return [*(numbers > 0)]
            if kind in ("scalar", "empty", "matrix"):
                return [np.zeros(shape, dtype)] * length
            return [*numbers.astype(dtype)]

    return feature, act


TEXTS = ("lift the cube", "Öffne die Schublade", "打开抽屉", "put it away.", "a\tb", "  spaced  ", "x" * 1500, "🤖 go")
BLANK = ("", " ", "\n", "\u200b", "\u3000")
STRANGE = (b"\xff\xfe\xfd", b"lift\x00it", b"y" * 9000, "a\u202eb".encode(), b"\x1b[2J")


def language(
    rng: random.Random, made: Drawn
) -> tuple[Any, Callable[[random.Random, int], tuple[list[Any], list]], bool]:
    kind = rng.choice(["text"] * 10 + ["several", "several", "tensor", "none", "number", "episode", "episode"])
    said = rng.choice(["one"] * 4 + ["per episode", "per step"] * 2 + ["partial", "blank", "strange", "some blank"])
    made.notes.append(f"words {kind} {said}")
    feature = {
        "several": F.Tensor(shape=(3,), dtype=np.object_),
        "tensor": F.Tensor(shape=(), dtype=np.object_),
        "number": F.Tensor(shape=(), dtype=np.int32),
        "none": None,
    }.get(kind, F.Text())

    def say(rng: random.Random, length: int) -> tuple[list[Any], list[str]]:
        own = rng.choice(TEXTS)
        lines: list[Any] = {
            "one": ["lift the cube"] * length,
            "per episode": [own] * length,
            "per step": [rng.choice(TEXTS) for _ in range(length)],
            "partial": [own if t % 2 else rng.choice(BLANK) for t in range(length)],
            "blank": [rng.choice(BLANK)] * length,
            "strange": [rng.choice(STRANGE)] * length,
            "some blank": [own if rng.random() < 0.5 else ""] * length,
        }[said]
        if kind == "number":
            return [np.int32(3)] * length, []
        texts = [line if isinstance(line, bytes) else line.encode() for line in lines]
        readable = [text.decode("utf-8", "replace") for text in texts]
        if kind == "several":
            return [np.array([text, b"", b"another"], object) for text in texts], [*readable, "another"]
        return texts, readable

    return feature, say, kind == "episode"


def states(rng: random.Random, made: Drawn) -> tuple[Any, Callable[[random.Random, int], list[Any] | None]]:
    kind = rng.choice(["vector"] * 3 + ["none"] * 2 + ["described"] * 4 + ["nan", "wide", "integers"])
    made.notes.append(f"state {kind}")
    if kind in ("described", "nan", "wide", "integers") or (kind == "none" and rng.random() < 0.2):
        made.spec["state"] = ["state"]
    if kind == "none":
        return None, lambda rng, length: None
    shape, dtype = ((2, 3), np.float64) if kind == "wide" else ((5,), np.int64 if kind == "integers" else np.float32)

    def feel(rng: random.Random, length: int) -> list[Any]:
        felt = np.random.default_rng(rng.randrange(2**32)).normal(size=(length, *shape)) * 10
        if kind == "nan" and rng.random() < 0.5:
            felt[rng.randrange(length)] = np.nan
        return [*felt.astype(dtype)]

    return F.Tensor(shape=shape, dtype=dtype), feel
