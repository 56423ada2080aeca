"""Records robots' requests and the answers as a LeRobot dataset."""

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
"""Seconds without a request after which a robot's next request starts another episode."""
LONGEST = 2000
"""Largest number of steps; a longer episode is split."""


@dataclass
class _Open:
    words: str
    last: float
    observations: list[Observation] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)


class Logbook:
    """Collects each robot's requests into episodes, and writes the dataset when the server stops.

    An episode consists of the requests of one connection, or over HTTP of one address, with the same instruction and
    without a pause of ten seconds. It is stored on disk when it ends. Its pictures are those that the policy saw; its
    success is not known. Requests for chunks are left out, because the robot moves without pictures between them.

    Args:
        folder: folder of the dataset, see `Recorder`.
        fps: steps per second, for the dataset's metadata.

    Raises:
        ValueError: the folder holds a dataset that was not made by a `Recorder`.
    """

    def __init__(self, folder: str | Path, fps: float) -> None:
        self.recorder, self.fps = Recorder(folder), fps
        self._open: dict[str, _Open] = {}
        self._pool = ThreadPoolExecutor(1, "recording")
        self._number, self._warned = 0, False

    def note(self, robot: str, observation: Observation, chunk: np.ndarray, whole: bool) -> None:
        """Record one answer, the chunk [T, D]; `whole` if the whole chunk was requested."""
        if whole and len(chunk) > 1:
            if not self._warned:
                log.warning("server.record: robots that ask for chunks of actions are not recorded")
            self._warned = True
            return
        now, going = time.monotonic(), self._open.get(robot)
        if going and (
            going.words != observation.instruction or now - going.last > PAUSE or len(going.actions) == LONGEST
        ):
            self.end(robot)
        going = self._open.setdefault(robot, _Open(observation.instruction, now))
        going.last = now
        going.observations.append(observation)
        going.actions.append(chunk[0])

    def end(self, robot: str) -> None:
        """End a robot's episode."""
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
            views = [view for view in going.observations[0].images if "@" not in view]
            pictures = {
                view: [np.asarray(observation.images[view]) for observation in going.observations] for view in views
            }
            felt = [observation.proprio for observation in going.observations if observation.proprio is not None]
            state = np.stack(felt) if len(felt) == len(going.observations) else None
            self.recorder.add(name, Taken(pictures, np.stack(going.actions), going.words, self.fps, state))
        except Exception:  # a full disk must not stop the server
            log.exception("an episode could not be recorded")
