"""FAST tokens: chunks of actions <-> ids, through frequencies and byte-pair encoding (arXiv 2501.09747, section 4).

A chunk is transformed by a cosine transform along time, its coefficients are rounded to integers and written as
characters, and a byte-level BPE merges characters that often occur together. In slow, smooth motion most coefficients
are zero, so 50 to 150 numbers become 20 to 60 ids.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "processor_config.json"
"""One of the two files in the released layout."""

Unwritable = Literal["nearest", "drop"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Result of decoding one sequence of ids.

    Attributes:
        frequencies: complete frequencies, out of as many as the chunk has steps; the others are set to zero.
        problem: why the sequence was incomplete or impossible; None for a sequence that encodes a chunk.
    """

    frequencies: int
    problem: str | None = None


class FastTokenizer:
    """Encodes chunks of actions as ids and decodes them. It keeps no state between calls.

    Args:
        bpe: a byte-level BPE of the library `tokenizers`.
        scale: factor of the coefficients before rounding; a larger one gives finer values and longer sequences.
        min_token: the smallest coefficient that can be written (released name).
        max_token: the largest one. None: `-min_token`, for files that do not say it, such as the released ones.
        unwritable: treatment of a coefficient that the vocabulary cannot write. With `nearest`, it is replaced by the
            nearest one that can be written, and decoding refuses values above `max_token`. With `drop`, as released,
            it is lost, and values above `max_token` are accepted if the vocabulary can write them.

    Raises:
        ValueError: for a scale that is not positive, an empty range, or a BPE that cannot write any of its values.
    """

    def __init__(
        self,
        bpe: Tokenizer,
        scale: float = 10,
        min_token: int = -354,
        max_token: int | None = None,
        unwritable: Unwritable = "nearest",
    ) -> None:
        if scale <= 0:
            raise ValueError(f"scale={scale} must be above 0; FAST's is 10")
        self.bpe, self.scale, self.min_token, self.unwritable = bpe, scale, min_token, unwritable
        self.max_token = -min_token if max_token is None else max_token
        if self.max_token < min_token:
            raise ValueError(f"max_token={self.max_token} is below min_token={min_token}: no coefficient fits between")
        self.vocab_size: int = bpe.get_vocab_size()
        known = set("".join(bpe.get_vocab()))
        codes = np.arange(self.max_token - min_token + 1)
        self._writable = codes[[all(_SYMBOL[byte] in known for byte in _bytes(code)) for code in codes.tolist()]]
        if not len(self._writable):
            raise ValueError(f"this tokenizer writes no coefficient from {min_token} to {self.max_token}")

    @classmethod
    def fit(
        cls,
        chunks: Iterable[NDArray[np.floating]],
        vocab_size: int = 1024,
        scale: float = 10,
        alphabet: Literal["complete", "released"] = "complete",
    ) -> "FastTokenizer":
        """Learn a vocabulary from chunks.

        Args:
            chunks: arrays [T, D] normalised to [-1, 1]; T and D may differ between them.
            vocab_size: largest number of ids; fewer are learnt if fewer pairs occur twice.
            scale: see the class.
            alphabet: `complete` starts from the bytes of every value in the range, so that each can be written;
                `released` starts from the characters themselves, as the public class does, which leaves unused ids and
                values without an id.

        Raises:
            ValueError: when there are no chunks, or more values than ids.
        """
        rounded = [_coefficients(np.asarray(chunk)[None], scale)[0] for chunk in chunks]
        if not rounded:
            raise ValueError("no chunks to fit a FAST tokenizer on")
        low, high = min(int(c.min()) for c in rounded), max(int(c.max()) for c in rounded)
        codes = range(high - low + 1)
        start = {chr(code) for code in codes}
        if alphabet == "complete":
            start = {_SYMBOL[byte] for code in codes for byte in _bytes(code)}
        if max(len(start), len(codes) if alphabet == "released" else 0) > vocab_size:
            raise ValueError(
                f"coefficients from {low} to {high} at scale={scale} need {len(start)} ids before the first pair is "
                f"learnt, and vocab_size={vocab_size}; give a larger vocab_size or a smaller scale"
            )
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=sorted(start),
            max_token_length=10000,
        )
        bpe.train_from_iterator(("".join(chr(v - low) for v in c.flatten()) for c in rounded), trainer)
        return cls(bpe, scale, low, high)

    @classmethod
    def read(cls, folder: str | Path, unwritable: Unwritable = "nearest") -> "FastTokenizer":
        """Read the universal tokenizer, or one that `save` or the public class wrote.

        Raises:
            FileNotFoundError: when the folder lacks one of the two files.
            ValueError: when a file has other contents than expected.
        """
        folder = Path(folder)
        if missing := [name for name in (TOKENIZER_FILE, CONFIG_FILE) if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{folder} is no FAST tokenizer, it lacks {' and '.join(missing)}; "
                "fit one with `openvla fit-fast`, or give a local copy of physical-intelligence/fast"
            )
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            bpe = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            return cls(bpe, config["scale"], config["min_token"], config.get("max_token"), unwritable)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} holds no FAST tokenizer that can be read: {error!r}") from error
        except Exception as error:  # `tokenizers` raises plain `Exception`
            if type(error) is not Exception:
                raise
            raise ValueError(f"{folder / TOKENIZER_FILE} holds no tokenizer that can be read: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write the released layout, which the public class can read, too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.bpe.save(str(folder / TOKENIZER_FILE))
        config: dict[str, Any] = {"scale": self.scale, "vocab_size": self.vocab_size, "min_token": self.min_token}
        config |= {"max_token": self.max_token, "time_horizon": None, "action_dim": None}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @property
    def config(self) -> dict[str, Any]:
        """Plain arguments of `from_config`, including the whole vocabulary, so that a checkpoint needs no folder."""
        return {
            "bpe": self.bpe.to_str(),
            "scale": self.scale,
            "min_token": self.min_token,
            "max_token": self.max_token,
            "unwritable": self.unwritable,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FastTokenizer":
        """Rebuild from `config`."""
        return cls(**{**config, "bpe": Tokenizer.from_str(config["bpe"])})

    @property
    def characters(self) -> list[bytes]:
        """The bytes of each coefficient that the vocabulary can write."""
        return [_bytes(code) for code in self._writable.tolist()]

    def coefficients(self, actions: NDArray[np.floating]) -> NDArray[np.int64]:
        """Rounded cosine coefficients [B, T, D] of chunks [B, T, D]: orthonormal DCT-II along time, half to even."""
        return _coefficients(actions, self.scale)

    def encode(self, actions: NDArray[np.floating]) -> list[list[int]]:
        """Ids of chunks [B, T, D], normalised to [-1, 1]; rows differ in length.

        Raises:
            ValueError: for numbers that are not finite.
        """
        if not np.isfinite(actions).all():
            raise ValueError("actions hold numbers that are not finite, which have no FAST tokens")
        codes = np.maximum(self.coefficients(actions) - self.min_token, 0).reshape(len(actions), -1)
        if self.unwritable == "nearest":
            codes = self._nearest(codes)
        return [self.bpe.encode("".join(map(chr, row))).ids for row in codes.tolist()]

    def _nearest(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        above = np.searchsorted(self._writable, codes).clip(0, len(self._writable) - 1)
        below = (above - 1).clip(0)
        upper, lower = self._writable[above], self._writable[below]
        return np.where(np.abs(upper - codes) <= np.abs(codes - lower), upper, lower)

    def decode(
        self, ids: Sequence[Sequence[int]], horizon: int, action_dim: int
    ) -> tuple[NDArray[np.float64], list[Arrival]]:
        """Chunks [B, T, D] of sequences, and the result of each decoding.

        For a sequence that is incomplete or has an impossible id, the complete frequencies before that place are used,
        which give the motion without its fine details. The released class returns zeros.

        Args:
            ids: one sequence per chunk, without end token.
            horizon, action_dim: T and D.
        """
        coefficients = np.zeros((len(ids), horizon, action_dim))
        arrivals = []
        for row, sequence in zip(coefficients, ids, strict=True):
            codes, problem = self._codes(sequence)
            if len(codes) > row.size:
                problem = problem or f"{len(codes)} coefficients where {row.size} belong"
            elif len(codes) < row.size:
                problem = problem or f"only {len(codes)} of {row.size} coefficients"
            whole = min(len(codes) // action_dim, horizon)
            row[:whole] = np.array(codes[: whole * action_dim]).reshape(whole, action_dim) + self.min_token
            arrivals.append(Arrival(whole, problem))
        return fft.idct(coefficients / self.scale, axis=1, norm="ortho"), arrivals

    def _codes(self, ids: Sequence[int]) -> tuple[list[int], str | None]:
        """Characters of a sequence, as numbers, up to the first invalid one, and the problem there."""
        known = self.bytes_of_ids
        problem = None
        for place, index in enumerate(ids):
            if not 0 <= index < len(known) or known[index] is None:
                problem = f"id {index} at place {place} stands for no coefficient"
                ids = ids[:place]
                break
        raw = b"".join(known[index] for index in ids)  # type: ignore[misc]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = "a half-written coefficient" if problem is None or error.end < len(raw) else problem
            text = raw[: error.start].decode("utf-8")
        codes = [ord(character) for character in text]
        limit = self.max_token - self.min_token if self.unwritable == "nearest" else 0x10FFFF
        for place, code in enumerate(codes):
            if code > limit:
                return codes[:place], f"coefficient {code + self.min_token} is above the largest, {self.max_token}"
        return codes, problem

    @cached_property
    def bytes_of_ids(self) -> list[bytes | None]:
        """The bytes that each id writes; None for unused ids, which a fit of the public class leaves."""
        bytes_by_id: list[bytes | None] = [None] * self.vocab_size
        for token, index in self.bpe.get_vocab().items():
            if all(symbol in _BYTE for symbol in token):
                bytes_by_id[index] = bytes(_BYTE[symbol] for symbol in token)
        return bytes_by_id


def _coefficients(actions: NDArray[np.floating], scale: float) -> NDArray[np.int64]:
    return np.around(fft.dct(actions, axis=1, norm="ortho") * scale).astype(np.int64)


def _bytes(code: int) -> bytes:
    return chr(code).encode("utf-8", errors="surrogatepass")


def _byte_symbols() -> dict[int, str]:
    """GPT-2's table of byte-level BPE: printable bytes map to themselves, the others to characters after 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_SYMBOL = _byte_symbols()
_BYTE = {symbol: byte for byte, symbol in _SYMBOL.items()}
