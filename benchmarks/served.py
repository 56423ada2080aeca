"""Frames that another process serves, a window of CPU time after the other: comparisons within one run.

Standard library only: the other process may run another Python.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

ANSWER = "frames per core-second:"


def per_core_second(serve: Callable[[], int], seconds: float, began: float | None = None) -> float:
    """Frames over a window of so much CPU time of this process; `began` where that is not now."""
    began = time.process_time() if began is None else began
    served, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        served += serve()
    return served / (time.process_time() - began)


def answer(serve: Callable[[], int]) -> None:
    """Run a window for every line on standard input, which says how many seconds long it is.

    What threads read ahead between two windows counts for the second one, which is served it.
    """
    ended = None
    for line in sys.stdin:
        rate = per_core_second(serve, float(line), ended)
        ended = time.process_time()
        print(ANSWER, rate, flush=True)


class Served:
    """A process that calls `answer`.

    Args:
        command: starts it.
        environment: variables it has besides those of this process, without its PYTHONPATH.

    Raises:
        SystemExit: it ended; with the last that it said.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            command,
            env=inherited | dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def window(self, seconds: float) -> float:
        """Frames per core-second of its next window."""
        assert self.process.stdin
        assert self.process.stdout
        print(seconds, file=self.process.stdin, flush=True)
        said: list[str] = []
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return float(line.removeprefix(ANSWER))
            said.append(line)
        raise SystemExit(f"{' '.join(map(str, self.process.args))} ended:\n{''.join(said[-30:])}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()
