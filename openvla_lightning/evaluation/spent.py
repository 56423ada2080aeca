"""Where the time of a rollout goes."""

from dataclasses import dataclass


@dataclass(slots=True)
class Spent:
    """Where the seconds of a rollout went, once everything is ready: `playing` in all, by the clock.

    Attributes:
        policy: until the policy had answered.
        waiting: until the simulators had, with nothing to ask the policy.
        simulator: that simulators worked, over all of their processes, of which there are `processes`.
    """

    playing: float = 0.0
    policy: float = 0.0
    waiting: float = 0.0
    simulator: float = 0.0
    processes: int = 0

    def shares(self) -> dict[str, float]:
        """`policy` and `waiting`, of this process' time, and `simulator`, of its processes' time."""
        if not self.playing:
            return {}
        return {
            "share_policy": round(self.policy / self.playing, 3),
            "share_waiting": round(self.waiting / self.playing, 3),
            "share_simulator": round(self.simulator / self.playing / self.processes, 3),
        }
