"""Where an evaluation's time goes: into the simulator, into the policy, into waiting for either."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Stopwatch:
    """Wall-clock seconds of rollouts; it measures and changes nothing.

    Attributes:
        processes: that simulate.
        calls: of the policy.
        actions: that these calls gave to execute.
        policy: seconds in these calls.
        waiting: seconds in which the policy stood still because no simulator had answered.
        simulator: seconds of all processes together inside the world.
        started, ended: when episodes began and ended; None before.
    """

    processes: int = 1
    calls: int = 0
    actions: int = 0
    policy: float = 0.0
    waiting: float = 0.0
    simulator: float = 0.0
    started: float | None = None
    ended: float | None = None

    @contextmanager
    def running(self, processes: int) -> Iterator[None]:
        """Around all episodes."""
        self.processes, self.started = processes, time.perf_counter()
        try:
            yield
        finally:
            self.ended = time.perf_counter()

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Around a call of the policy."""
        before = time.perf_counter()
        yield
        self.calls += 1
        self.policy += time.perf_counter() - before

    @contextmanager
    def idling(self) -> Iterator[None]:
        """Around waiting for simulators."""
        before = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - before

    def summary(self, episodes: int) -> dict[str, float]:
        """For results.json, of this call alone: `episodes` are those it played.

        `episodes_per_hour`, `seconds_per_call`, `actions_per_call`, and three shares of the time in which episodes ran:
        `policy_share`, in which the policy worked; `waiting_share`, in which it waited for simulators (what is left of
        1 is bookkeeping); `simulator_share`, how busy the processes that simulate were on average. Policy and
        simulators work at the same time, so that the shares do not add up to 1.
        """
        if self.started is None or self.ended is None or self.ended <= self.started:
            return {}
        seconds = self.ended - self.started
        found = {
            "episodes_per_hour": round(3600 * episodes / seconds, 1),
            "policy_share": round(self.policy / seconds, 3),
            "waiting_share": round(self.waiting / seconds, 3),
            "simulator_share": round(self.simulator / (seconds * self.processes), 3),
        }
        if self.calls:
            found["seconds_per_call"] = round(self.policy / self.calls, 6)
            found["actions_per_call"] = round(self.actions / self.calls, 2)
        return found
