"""RLDS datasets drawn at random: features, dtypes, encodings, lengths, words, splits, versions, stray files, damage."""

import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import made_rlds
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

F = tfds.features
NAME = "made"
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


def draw(root: Path, seed: int) -> Drawn:
    """Write dataset number `seed` below `root` and say what is to be expected of it."""
    rng = random.Random(seed)
    made = Drawn(root)
    image, encode = _images(rng, made)
    action, act = _actions(rng, made)
    language, say, once = _language(rng, made)
    state, feel = _states(rng, made)
    seen = {"image": image} | ({"state": state} if state is not None else {})
    step = {"observation": F.FeaturesDict(seen), "action": action}
    if language is not None and not once:
        step["language_instruction"] = language
    top = {"steps": F.Dataset(step)}
    if once:
        top["episode_metadata"] = F.FeaturesDict({"language_instruction": language})
    splits = _splits(rng, made)
    episodes: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for split, count in splits.items():
        episodes[split], made.shades[split], made.words[split] = [], [], []
        for _ in range(count):
            length = rng.choice([1, 2, 3, 5, 8, 8, 12])
            shades = [30 + (37 * number + 11 * t) % 190 for t in range(length)]
            told, readable = say(rng, length)
            pictures = [encode(rng, shade) for shade in shades]
            acts, felt = act(rng, length), feel(rng, length)
            rows = []
            for t in range(length):
                row: dict[str, Any] = {"observation": {"image": pictures[t][0]}, "action": acts[t]}
                if felt is not None:
                    row["observation"]["state"] = felt[t]
                if language is not None and not once:
                    row["language_instruction"] = told[t]
                rows.append(row)
            episodes[split].append(
                {"steps": rows} | ({"episode_metadata": {"language_instruction": told[0]}} if once else {})
            )
            made.shades[split].append([known for _, known in pictures])
            made.words[split].append([readable[0]] * length if once else readable)
            number += 1
    shards = rng.choice([1, 2, 3, 64])
    folder = made_rlds.write(root, episodes, F.FeaturesDict(top), NAME, "1.0.0", episodes_per_shard=shards)
    _describe(rng, made)
    _surround(rng, made, folder)
    if rng.random() < 0.25:
        _damage(rng, made, folder)
    return made


def _images(rng: random.Random, made: Drawn) -> tuple[Any, Callable[[random.Random, int], tuple[Any, int | None]]]:
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
    import zlib

    picture[29:33] = zlib.crc32(picture[12:29]).to_bytes(4, "big")
    return bytes(picture)


def _actions(rng: random.Random, made: Drawn) -> tuple[Any, Callable[[random.Random, int], list[Any]]]:
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


def _language(
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


def _states(rng: random.Random, made: Drawn) -> tuple[Any, Callable[[random.Random, int], list[Any] | None]]:
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


def _splits(rng: random.Random, made: Drawn) -> dict[str, int]:
    count = rng.choice([1, 2, 5, 9, 9])
    splits = rng.choice(
        [{"train": count}] * 8
        + [{"train": count, "val": 2}, {"train": count, "validation": 1}, {"train": count, "test": 2}]
        + [{"all": count}, {"val": count}, {"train": 1, "val": 1, "Success": 2}]
    )
    made.notes.append(f"splits {splits}")
    return dict(splits)


def _describe(rng: random.Random, made: Drawn) -> None:
    """Say what it is, now and then wrongly; and choose how it is read."""
    made.spec.setdefault("cameras", {"primary": "image"})
    wrong = rng.choice([None] * 30 + ["camera", "mask", "absolute", "encoding", "language", "action", "state", "noop"])
    if wrong:
        made.notes.append(f"described with another {wrong}")
        made.spec |= {
            "camera": {"cameras": {"primary": "imgae"}},
            "mask": {"mask": [True] * 5},
            "absolute": {"absolute": [False] * 3},
            "encoding": {"encoding": "joint_pos"},
            "language": {"language": "instruction"},
            "action": {"action": "actions"},
            "state": {"state": ["joints"]},
            "noop": {"noop_threshold": 1e6},
        }[wrong]
    if rng.random() < 0.3:
        made.reader["bad_trajectories"] = "skip"
    if rng.random() < 0.4:
        made.reader["check_images"] = True
    made.options |= {
        "noop_filter": rng.choice(["near_zero", "none", "released", "first_step"]),
        "val_fraction": rng.choice([0.0, 0.05, 0.5]),
        "action_chunk": rng.choice([1, 1, 3]),
        "proprio": bool(made.spec.get("state")) and rng.random() < 0.5,
        "bad_instructions": rng.choice(["skip", "skip", "error"]),
        "images": rng.choice(["released", "fast"]),
    }
    made.notes.append(f"{made.reader} {made.options}")


def _surround(rng: random.Random, made: Drawn, folder: Path) -> None:
    """What else lies about."""
    for stray in rng.sample(["README.md", ".DS_Store", ".nfs0000001", "dataset_statistics_0123.json", "a folder"], 2):
        made.notes.append(f"stray {stray}")
        if stray == "a folder":
            (folder / "a folder").mkdir()
        else:
            (folder / stray).write_text("x")
    beside = rng.choice([None] * 4 + ["1.0.0.bak", "0.9.0", "1.0.0.incompleteABC123", "tmp"])
    if beside:
        made.notes.append(f"beside it {beside}")
        shutil.copytree(folder, folder.with_name(beside))
        for shard in folder.with_name(beside).glob("*.tfrecord*"):
            shard.write_bytes(b"old")


DAMAGE = (
    *("cut", "flip", "gone", "empty", "pointer", "folder", "link", "swapped", "twice", "gzip"),
    *("features-gone", "features", "info", "info-text", "lengths", "splits"),
)


def _damage(rng: random.Random, made: Drawn, folder: Path) -> None:
    shards = sorted(folder.glob("*.tfrecord*"))
    shard = rng.choice(shards)
    kind = rng.choice(DAMAGE)
    made.notes.append(f"damage: {kind} of {shard.name}")
    made.damaged, made.exact = shard.name, False
    content, info = shard.read_bytes(), folder / "dataset_info.json"
    if kind == "cut":
        shard.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "flip":
        place = rng.randrange(len(content))
        shard.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
    elif kind == "gone":
        shard.unlink()
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7121920\n")
    elif kind == "folder":
        shard.unlink()
        shard.mkdir()
    elif kind == "link":
        shard.unlink()
        shard.symlink_to(folder / "nowhere")
    elif kind == "features-gone":
        (folder / "features.json").unlink()
        made.damaged = "features.json"
    elif kind == "features":
        text = (folder / "features.json").read_text()
        damaged = rng.choice([text[: rng.randrange(len(text))], "[]", "{}", "null", text.replace("steps", "stops")])
        (folder / "features.json").write_text(damaged)
        made.damaged = "features.json" if "stops" not in damaged else None
    elif kind == "info":
        text = info.read_text()
        info.write_text(text[: rng.randrange(len(text))])
        made.damaged = "dataset_info.json"
    elif kind == "info-text":
        info.write_bytes(rng.choice([b"", b"[]", b"{}", b"\xff\xfe", b'{"splits": 3}', b'{"name": "made"}']))
        made.damaged = None
    elif kind in ("lengths", "splits"):
        said = json.loads(info.read_text())
        if kind == "splits":
            said["splits"] = rng.choice([[], None, [{"name": "train"}], [{}], "train"])
        else:
            said["splits"][0]["shardLengths"][0] = rng.choice(["0", "99", "x", -1, None])
        info.write_text(json.dumps(said))
        made.damaged = None
    elif kind == "swapped":
        other = rng.choice(shards)
        there = other.read_bytes()
        shard.write_bytes(there)
        other.write_bytes(content)
        made.damaged = None
    elif kind == "twice":
        shard.write_bytes(content * 2)
    elif kind == "gzip":
        import gzip

        shard.write_bytes(gzip.compress(content))
