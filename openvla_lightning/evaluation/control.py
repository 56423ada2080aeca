"""Whether the world waits for the policy: blocking control, or real time with the latency of an inference."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.action_head.ensemble import AdaptiveEnsemble, Memory, TemporalEnsemble
from openvla_lightning.types import Observation

CONTROLS = ("blocking", "realtime")
ENSEMBLES: dict[str, TemporalEnsemble | AdaptiveEnsemble] = {
    "temporal": TemporalEnsemble(),
    "adaptive": AdaptiveEnsemble(),
}


class Actor(Protocol):
    """Whatever chooses actions; `openvla_lightning.Policy` does.

    One that is told more than an image, or gives more than an action, has `act_chunk` as `Policy` does, and `history`
    where it looks at earlier pictures, too.
    """

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
        execute: how many actions of a chunk are executed before the policy looks again; None: all of them. In real time
            the robot executes them while the policy thinks about the next ones.
        ensemble: make one action of what the last chunks say of now, looking again after each: `temporal` (ACT's) or
            `adaptive` (CogACT's), see `action_head.ensemble`; None: the newest chunk alone counts.

    Raises:
        ValueError: for an unknown mode, a rate that is not positive, a latency below zero, or either with `blocking`.
    """

    mode: str = "blocking"
    rate_hz: float | None = None
    latency: float | None = None
    measured: bool = False
    execute: int | None = None
    ensemble: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in CONTROLS:
            raise ValueError(f"eval.control={self.mode!r} is not known; choose one of {', '.join(CONTROLS)}")
        if self.mode == "blocking" and (self.rate_hz, self.latency) != (None, None):
            raise ValueError("eval.rate_hz and eval.latency need eval.control=realtime: under blocking the world waits")
        if self.rate_hz is not None and self.rate_hz <= 0:
            raise ValueError(f"eval.rate_hz must be positive, got {self.rate_hz}")
        if self.execute is not None and self.execute < 1:
            raise ValueError(f"eval.execute={self.execute}: at least one action of a chunk, or null for all")
        if self.ensemble is not None:
            if self.ensemble not in ENSEMBLES:
                raise ValueError(
                    f"eval.ensemble={self.ensemble!r} is not known; choose {', '.join(ENSEMBLES)}, or null"
                )
            if self.mode != "blocking" or self.execute not in (None, 1):
                raise ValueError(
                    f"eval.ensemble={self.ensemble} looks again after each action: it goes with eval.control=blocking "
                    "and without eval.execute"
                )
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
        new = ("execute", "ensemble")
        told = {name: value for name, value in asdict(self).items() if name not in new or value is not None}
        return told | ({"delay": self.delay} if self.latency is not None else {})

    def chosen(self, memory: Memory, chunk: NDArray[np.float64]) -> tuple[Memory, NDArray[np.float64]]:
        """What to remember, and the actions [n, D] that are executed.

        Args:
            memory: what this returned the last time; `()` at the start of an episode.
            chunk: float64 [T, D], what the policy answered.

        Raises:
            ValueError: when there are fewer actions.
        """
        if self.ensemble is not None:
            usual = ENSEMBLES[self.ensemble]
            memory, action = replace(usual, horizon=min(usual.horizon, len(chunk))).step(memory, chunk)
            return memory, action[None]
        if self.execute is not None and self.execute > len(chunk):
            raise ValueError(f"eval.execute={self.execute}, but the policy gives {len(chunk)} action(s) at a time")
        return memory, chunk[: self.execute]

    def __str__(self) -> str:
        if self.ensemble is not None:
            return f"{self.mode}, {self.ensemble} ensemble"
        if self.mode == "blocking":
            return self.mode if self.execute is None else f"{self.mode}, {self.execute} of a chunk"
        return f"{self.rate_hz:g} Hz, {self.latency:.2f} s latency"


def measure_latency(policy: Actor, repeats: int = 5) -> float:
    """Median seconds from one picture to its action, after two that warm up."""
    image, words = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8), "lift the red cube"
    standing = getattr(policy, "standing", lambda image, words: Observation({"primary": image}, words))
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        ask(policy, [standing(image, words)])
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


def ask(policy: Actor, observations: Sequence[Observation]) -> NDArray[np.float64]:
    """Chunks of actions float64 [B, T, D] for these observations.

    Raises:
        ValueError: when the policy's answer has another shape.
    """
    if hasattr(policy, "act_chunk"):
        actions, shape = np.asarray(policy.act_chunk(observations), np.float64), "[B, T, D]"
    else:
        images, words = [seen.images["primary"] for seen in observations], [seen.instruction for seen in observations]
        actions, shape = (
            np.asarray(policy.act(images, words), np.float64),
            "[B, D]",
        )
        actions = actions[:, None] if actions.ndim == 2 else actions
    if actions.ndim != 3 or len(actions) != len(observations) or not actions.shape[1]:
        raise ValueError(f"asked for {len(observations)} actions {shape}, the policy gave shape {list(actions.shape)}")
    return actions


def observed(seen: Mapping[str, np.ndarray], instruction: str, past: Sequence[Mapping[str, np.ndarray]]) -> Observation:
    """What a world shows as an observation, `image` as the view `primary`, `wrist_image` as `wrist`.

    Args:
        seen: what the world shows now.
        instruction: what the robot is told.
        past: what it showed one step earlier, two steps earlier, and so on.
    """
    images = {}
    for back, shown in enumerate([seen, *past]):
        for key in (key for key in shown if key.endswith("image")):
            camera = key.removesuffix("image").removesuffix("_") or "primary"
            images[f"{camera}@-{back}" if back else camera] = shown[key]
    return Observation(images, instruction, seen.get("proprio"))
