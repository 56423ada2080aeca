"""Writes each episode to disk when it ends, so that a killed evaluation can resume."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openvla_lightning.env.base import RequestError
from openvla_lightning.report.results import Episode
from openvla_lightning.runtime.files import write_text

FILE_NAME = "episodes.jsonl"


class Journal:
    """A file with one line per finished episode, after a first line with the evaluation's identity.

    Args:
        folder: folder of the evaluation; created if absent.
        identity: settings that must be equal for all episodes: checkpoint, world, control, versions.

    Raises:
        ValueError: the folder holds episodes with another identity; the message names the difference.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._episodes: dict[tuple[str, int], Episode] = {}
        identity = json.loads(json.dumps(identity, default=str))
        lines = self._lines()
        if lines:
            before = lines[0]
            if differ := sorted(n for n in {*before, *identity} if before.get(n) != identity.get(n)):
                name = differ[0]
                raise RequestError(
                    f"{self.path} holds episodes of another evaluation: {', '.join(differ)} differ ({name} was "
                    f"{before.get(name)!r}, is {identity.get(name)!r}); name another folder (paths.output_dir=...)"
                )
            for line in lines[1:]:
                episode = Episode(**line)
                self._episodes[episode.task, episode.seed] = episode
        self._write(identity, *(asdict(episode) for episode in self._episodes.values()))

    def find(self, task: str, seed: int, instruction: str | None) -> Episode | None:
        """The played episode, if there is one without an error; `instruction` None means the world's own."""
        episode = self._episodes.get((task, seed))
        played = episode is not None and episode.error is None and instruction in (None, episode.instruction)
        return episode if played else None

    def add(self, episode: Episode) -> None:
        """Write one more line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(episode)) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]  # a kill may leave half a line

    def _write(self, *lines: Mapping[str, Any]) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
