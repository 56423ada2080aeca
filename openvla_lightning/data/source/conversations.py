"""Conversations about images in LLaVA's JSON layout, and robot demonstrations as such conversations."""

import json
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openvla_lightning.data.source import Source
from openvla_lightning.processor.gate import as_rgb
from openvla_lightning.runtime.files import pointer
from openvla_lightning.types import Conversation

log = logging.getLogger(__name__)

QUESTION = "What is the robot told to do?"
SPEAKERS = ("human", "gpt")
PLACEHOLDER = "<image>"
"""Marks the image in LLaVA's texts; the model puts the image after BOS instead."""


class ConversationSource(Protocol):
    """One dataset of conversations."""

    name: str

    @property
    def with_image(self) -> NDArray[np.bool_]:
        """bool [N]: which conversations have an image."""

    def missing(self) -> str | None:
        """What is missing and where to get it; None if nothing is missing. Takes milliseconds."""

    def prepare(self) -> None:
        """Do the slow preparation once."""

    def read(self, place: int, number: int) -> Conversation:
        """The conversation at a place; `number` is its number in the order of training."""


class Conversations:
    """A JSON list of `{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}`.

    Entries without `image`, or with null for one, are text alone.

    Args:
        name: its name in metrics.
        path: the JSON file.
        image_root: folder that the images' paths are relative to.
        missing_images: treatment of conversations whose image is missing: `error` stops before training and lists
            the first ones, `skip` leaves them out and counts them.

    Raises:
        ValueError: `missing_images` has another value.
    """

    def __init__(
        self, name: str, path: str | Path, image_root: str | Path, missing_images: Literal["error", "skip"] = "error"
    ) -> None:
        if missing_images not in ("error", "skip"):
            raise ValueError(f"data.source.missing_images={missing_images}: choose error or skip")
        self.name, self.path, self.image_root = name, Path(path).expanduser(), Path(image_root).expanduser()
        self.missing_images = missing_images

    def missing(self) -> str | None:
        """What is missing and where to get it; None when all is there."""
        if self.path.is_file():
            return None
        return (
            f"{self.name}: no file {self.path}. Any JSON list in LLaVA's layout will do (data.source.path=..., its "
            "images below data.source.image_root=...); the paper's VLM used llava_v1_5_mix665k.json, from "
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
        )

    def prepare(self) -> None:
        """Read the file and check that every image exists; this writes nothing to the disk.

        Raises:
            ValueError: the file does not hold conversations, or all of their images are missing.
            FileNotFoundError: images are missing, and `missing_images` is `error`.
        """
        _ = self._entries

    def __len__(self) -> int:
        return len(self.with_image)

    @cached_property
    def with_image(self) -> NDArray[np.bool_]:
        """bool [N]: which conversations are about an image."""
        return self._entries[1]

    @cached_property
    def _entries(self) -> tuple[bytes, NDArray[np.bool_], NDArray[np.int64]]:
        """All entries as JSON in one bytes object, which of them have an image, and the bounds of each.

        Worker processes share one bytes object. A million dictionaries would be copied, because reference counts
        change.
        """
        try:
            entries = json.loads(self.path.read_bytes())
        except ValueError as error:  # of its grammar or its encoding
            raise ValueError(f"{self.path} is not JSON: {pointer(self.path) or error}") from error
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{self.path} holds no list of conversations")
        entries = self._with_their_images([_checked(entry, place, self.path) for place, entry in enumerate(entries)])
        texts = [json.dumps(entry, ensure_ascii=False).encode() for entry in entries]
        with_image = np.array(["image" in entry for entry in entries])
        return b"".join(texts), with_image, np.cumsum([0, *map(len, texts)])

    def _with_their_images(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries whose image exists or that have none; each folder is listed once, because it may be large."""
        listed: dict[Path, set[str]] = {}
        absent: list[int] = []
        for place, entry in enumerate(entries):
            if "image" in entry:
                path = self.image_root / entry["image"]
                if path.parent not in listed:
                    listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
                if path.name not in listed[path.parent]:
                    absent.append(place)
        if not absent:
            return entries
        few = ", ".join(f"{entries[place]['image']} (entry {place})" for place in absent[:3])
        problem = f"{self.path.name}: {len(absent):,} of {len(entries):,} conversations name an image that is not in "
        problem += f"{self.image_root}, the first {few}"
        if self.missing_images == "error":
            raise FileNotFoundError(
                f"{problem}. Say where they are (data.source.image_root=...), or leave such conversations out with "
                "data.source.missing_images=skip"
            )
        if len(absent) == len(entries):
            raise ValueError(f"{problem}: none is left")
        log.warning(f"{problem}; they are left out")
        gone = set(absent)
        return [entry for place, entry in enumerate(entries) if place not in gone]

    def read(self, place: int, number: int) -> Conversation:
        """The conversation at a place.

        Raises:
            FileNotFoundError: its image is missing.
            ValueError: its image cannot be read.
        """
        content, _, bounds = self._entries
        entry = json.loads(content[bounds[place] : bounds[place + 1]])
        image = self._image(entry["image"]) if "image" in entry else None
        said = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in entry["conversations"]]
        return Conversation(image, tuple(zip(said[::2], said[1::2], strict=True)), self.name, number)

    def _image(self, path: str) -> NDArray[np.uint8]:
        try:
            with Image.open(self.image_root / path) as image:
                return np.asarray(as_rgb(image))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.path.name} speaks of the image {path}, and there is none in {self.image_root}: say where "
                "(data.source.image_root=...)"
            ) from None
        except Exception as error:  # decoders raise anything at damaged bytes
            reason = pointer(self.image_root / path) or error
            raise ValueError(f"{self.image_root / path} is no image that can be read: {reason}") from error


class Captions:
    """Robot demonstrations as conversations: a picture, the question for the task, and the instruction as the answer.

    Args:
        source: the robot dataset.
        image_size: side of the square images, in pixels.
    """

    def __init__(self, source: Source, image_size: int) -> None:
        self.source, self.name, self.image_size = source, source.name, image_size

    def missing(self) -> str | None:
        """What is missing and where to get it; None when all is there."""
        return self.source.missing()

    def prepare(self) -> None:
        """Index the dataset."""
        self.source.prepare()

    @cached_property
    def with_image(self) -> NDArray[np.bool_]:
        """All True: every step with an instruction is one conversation."""
        return np.ones(len(self._steps), bool)

    @cached_property
    def _steps(self) -> NDArray[np.int64]:
        index = self.source.index
        told = np.array([bool(words.strip()) for words in index.instructions])
        return np.flatnonzero(told[index.instruction])

    def read(self, place: int, number: int) -> Conversation:
        """The conversation about one step."""
        step, index = int(self._steps[place]), self.source.index
        answer = index.instructions[index.instruction[step]]
        image = self.source.image("primary", step, self.image_size)
        black = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        return Conversation(black if image is None else image, ((QUESTION, answer),), self.name, number)


def _checked(entry: Any, place: int, path: Path) -> dict[str, Any]:
    """Return `entry`; raise ValueError with its place if it is no conversation."""
    where = f"{path}, entry {place}"
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not turns or len(turns) % 2:
        raise ValueError(f"{where}: `conversations` must be pairs of a question and an answer")
    for number, turn in enumerate(turns):
        speaker = SPEAKERS[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(f'{where}, turn {number}: expected {{"from": "{speaker}", "value": "..."}}')
    if not isinstance(entry.get("image"), str | None):
        raise ValueError(f"{where}: `image` must be the path of one image, and is {entry['image']!r}")
    return {key: value for key, value in entry.items() if key != "image" or value is not None}
