"""Whether the world waits for the policy: blocking control, or real time with the latency of an inference."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol

import numpy as np

CONTROLS = ("blocking", "realtime")


class Actor(Protocol):
    """Whatever chooses actions; `openvla_lightning.Policy` does."""

    def act(self, image: Sequence[np.ndarray], instruction: Sequence[str]) -> np.ndarray:
        """Images uint8 [H, W, 3] and as many instructions -> actions [B, D] in the environment's units."""


@dataclass(frozen=True, slots=True)
class Control:
    """How time passes while the policy thinks.

    `blocking`: not at all, as in a simulator, or on a robot that finishes each action before it looks again.
    `realtime`: the world executes `rate_hz` actions a second, whatever the policy does. An action arrives `delay`
    control steps after its picture. Meanwhile the robot finishes its last action and then holds its position. So a slow
    policy acts on old pictures, and gets fewer actions into an episode, whose limit is in the world's time.

    Attributes:
        mode: `blocking` or `realtime`.
        rate_hz: actions a second; None: as many as the world says of itself.
        latency: seconds from a picture to its action; None: measured on this machine, one picture at a time.
        measured: whether `latency` was.

    Raises:
        ValueError: for an unknown mode, a rate that is not positive, a latency below zero, or either with `blocking`.
    """

    mode: str = "blocking"
    rate_hz: float | None = None
    latency: float | None = None
    measured: bool = False

    def __post_init__(self) -> None:
        if self.mode not in CONTROLS:
            raise ValueError(f"eval.control={self.mode!r} is not known; choose one of {', '.join(CONTROLS)}")
        if self.mode == "blocking" and (self.rate_hz, self.latency) != (None, None):
            raise ValueError("eval.rate_hz and eval.latency need eval.control=realtime: under blocking the world waits")
        if self.rate_hz is not None and self.rate_hz <= 0:
            raise ValueError(f"eval.rate_hz must be positive, got {self.rate_hz}")
        if self.latency is not None and self.latency < 0:
            raise ValueError(f"eval.latency must be at least 0 seconds, got {self.latency}")

    @property
    def delay(self) -> int:
        """Actions' time from a picture to the action that it leads to."""
        if self.mode == "blocking":
            return 0
        assert self.rate_hz is not None
        assert self.latency is not None
        return round(self.rate_hz * self.latency)

    def settle(self, policy: Actor, world_hz: float) -> "Control":
        """Fill in what was left open: the world's own rate, and the policy's latency."""
        if self.mode == "blocking":
            return self
        measured = self.latency is None
        latency = measure_latency(policy) if self.latency is None else self.latency
        return replace(self, rate_hz=self.rate_hz or world_hz, latency=latency, measured=measured)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self) | ({"delay": self.delay} if self.latency is not None else {})

    def __str__(self) -> str:
        if self.mode == "blocking":
            return self.mode
        return f"{self.rate_hz:g} Hz, {self.latency:.2f} s latency"


def measure_latency(policy: Actor, repeats: int = 5) -> float:
    """Median seconds from one picture to its action, after two that warm up."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        policy.act([image], ["lift the red cube"])
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])
