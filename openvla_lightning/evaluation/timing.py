"""Measures an evaluation's time in the simulator, in the policy, and in waiting."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Stopwatch:
    """Wall-clock seconds of rollouts; measuring does not change them.

    Attributes:
        processes: number of processes that simulate.
        calls: number of the policy's calls.
        actions: number of actions to execute from these calls.
        policy: seconds in these calls.
        waiting: seconds in which the policy waited for simulators.
        simulator: seconds of all processes together inside the world.
        started, ended: times of the start and end of the episodes; None before.
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
        """Context around all episodes."""
        self.processes, self.started = processes, time.perf_counter()
        try:
            yield
        finally:
            self.ended = time.perf_counter()

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Context around a call of the policy."""
        before = time.perf_counter()
        yield
        self.calls += 1
        self.policy += time.perf_counter() - before

    @contextmanager
    def idling(self) -> Iterator[None]:
        """Context around waiting for simulators."""
        before = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - before

    def summary(self, episodes: int) -> dict[str, float]:
        """The times of this call for results.json; `episodes` is the number of episodes that it played.

        `episodes_per_hour`, `seconds_per_call`, `actions_per_call`, and three shares of the time in which episodes ran:
        `policy_share`, in which the policy worked; `waiting_share`, in which it waited for simulators (the rest to 1 is
        bookkeeping); `simulator_share`, the mean share in which the simulator processes were busy. Policy and
        simulators work at the same time, so the shares do not add up to 1.
        """
        if self.started is None or self.ended is None or self.ended <= self.started:
            return {}
        seconds = self.ended - self.started
        times = {
            "episodes_per_hour": round(3600 * episodes / seconds, 1),
            "policy_share": round(self.policy / seconds, 3),
            "waiting_share": round(self.waiting / seconds, 3),
            "simulator_share": round(self.simulator / (seconds * self.processes), 3),
        }
        if self.calls:
            times["seconds_per_call"] = round(self.policy / self.calls, 6)
            times["actions_per_call"] = round(self.actions / self.calls, 2)
        return times
