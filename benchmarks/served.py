"""Frames that another process serves, in windows of CPU time, for comparisons within one run.

Standard library only: the other process may run another Python.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

ANSWER = "frames per core-second:"


def per_core_second(serve: Callable[[], int], seconds: float, began: float | None = None) -> float:
    """Frames per core-second over a window of `seconds` CPU time of this process; `began` is its start, if not now."""
    began = time.process_time() if began is None else began
    served, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        served += serve()
    return served / (time.process_time() - began)


def answer(serve: Callable[[], int]) -> None:
    """Run a window for every line on standard input, which has its length in seconds.

    Frames that threads prefetch between two windows count for the second one, which receives them.
    """
    ended = None
    for line in sys.stdin:
        rate = per_core_second(serve, float(line), ended)
        ended = time.process_time()
        print(ANSWER, rate, flush=True)


class Served:
    """A process that calls `answer`.

    Args:
        command: the command that starts it.
        environment: variables besides those of this process, whose PYTHONPATH is removed.

    Raises:
        SystemExit: the process ended; the message has its last output.
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
        """End the process."""
        self.process.kill()
        self.process.communicate()
