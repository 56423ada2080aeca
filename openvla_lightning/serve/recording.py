"""What robots asked and were answered, as a LeRobot dataset."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from openvla_lightning.data.source.lerobot.recorder import Recorder, Taken
from openvla_lightning.types import Observation

log = logging.getLogger(__name__)
PAUSE = 10.0
"""Seconds without a question after which a robot's next one begins another episode."""
LONGEST = 2000
"""Steps; a longer episode is cut in two."""


@dataclass
class _Open:
    words: str
    last: float
    seen: list[Observation] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)


class Logbook:
    """Collects the questions of each robot into episodes, and writes the dataset when the server stops.

    An episode is what one connection, or over HTTP one address, asks with the same words and without a pause of ten
    seconds. It is on disk as soon as it ends. Pictures are those the policy looked at. Nobody says whether it was a
    success. Questions for chunks are left out: between two of them the robot moves without a picture.

    Args:
        folder: of the dataset, see `Recorder`.
        fps: steps per second that the dataset states.

    Raises:
        ValueError: the folder holds a dataset that was not recorded.
    """

    def __init__(self, folder: str | Path, fps: float) -> None:
        self.recorder, self.fps = Recorder(folder), fps
        self._open: dict[str, _Open] = {}
        self._pool = ThreadPoolExecutor(1, "recording")
        self._number, self._told = 0, False

    def note(self, robot: str, asked: Observation, chunk: np.ndarray, whole: bool) -> None:
        """One answer, the chunk [T, D]; `whole` where all of it was asked for."""
        if whole and len(chunk) > 1:
            if not self._told:
                log.warning("server.record: robots that ask for chunks of actions are not recorded")
            self._told = True
            return
        now, going = time.monotonic(), self._open.get(robot)
        if going and (going.words != asked.instruction or now - going.last > PAUSE or len(going.actions) == LONGEST):
            self.end(robot)
        going = self._open.setdefault(robot, _Open(asked.instruction, now))
        going.last = now
        going.seen.append(asked)
        going.actions.append(chunk[0])

    def end(self, robot: str) -> None:
        """A robot's episode is over."""
        if going := self._open.pop(robot, None):
            self._number += 1
            self._pool.submit(self._keep, f"{time.time_ns()}_{self._number}", going)

    def close(self) -> None:
        """End all episodes and write the dataset."""
        for robot in list(self._open):
            self.end(robot)
        self._pool.shutdown()
        if (folder := self.recorder.write(progress=False)) is not None:
            log.info(f"Recorded into {folder}")

    def _keep(self, name: str, going: _Open) -> None:
        try:
            views = [view for view in going.seen[0].images if "@" not in view]
            pictures = {view: [np.asarray(seen.images[view]) for seen in going.seen] for view in views}
            felt = [seen.proprio for seen in going.seen if seen.proprio is not None]
            state = np.stack(felt) if len(felt) == len(going.seen) else None
            self.recorder.add(name, Taken(pictures, np.stack(going.actions), going.words, self.fps, state))
        except Exception:  # a full disk must not take the robots' policy from them
            log.exception("an episode could not be recorded")
