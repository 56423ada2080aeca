"""Blocking control, in which the world waits for the policy, and real-time control with the policy's latency."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.base import RequestError, refusing
from openvla_lightning.evaluation.ensemble import AdaptiveEnsemble, Ensemble, TemporalEnsemble
from openvla_lightning.types import Observation

CONTROLS = ("blocking", "realtime")
ENSEMBLES: dict[str, Callable[..., Ensemble]] = {"adaptive": AdaptiveEnsemble, "temporal": TemporalEnsemble}


class Actor(Protocol):
    """An object that chooses actions, such as `openvla_lightning.Policy`.

    If it reads more than an image or returns chunks, it has `act_chunk` like `Policy`, and `history` if it
    reads earlier pictures. If it needs more than an image, its `check` reports missing inputs.
    """

    def act(self, image: Sequence[np.ndarray], instruction: Sequence[str]) -> np.ndarray:
        """Images uint8 [H, W, 3] and as many instructions -> actions [B, D] in the environment's units."""


@dataclass(frozen=True, slots=True)
class Control:
    """How the world's time passes while the policy computes.

    `blocking`: the world stands still, as in a simulator, or on a robot that finishes each action before it looks
    again. `realtime`: the world runs at `rate_hz` control steps per second. An action arrives `delay` control steps
    after its picture. Meanwhile the robot finishes its last action and then holds its position. So a slow policy acts
    on old pictures, and sends fewer actions per episode, because the episode's limit is in the world's time.

    Attributes:
        mode: `blocking` or `realtime`.
        rate_hz: control steps per second; None: the world's own rate.
        latency: seconds from a picture to its action; None: measured on this machine, one picture at a time.
        measured: whether `latency` was measured.
        execute: how many actions of a chunk are executed before the policy looks again; None: all of them. In real
            time, the robot executes them while the policy computes the next ones.
        ensemble: `adaptive` (CogACT's) or `temporal` (ACT's): the policy looks again after every action, and the
            predictions of its chunks for the present step are averaged; None: only the newest chunk is used.
        ensemble_horizon: how many decisions count; None: 7 and 8, as published.

    Raises:
        ValueError: for an unknown mode, a rate that is not positive, a negative latency, or either with `blocking`.
    """

    mode: str = "blocking"
    rate_hz: float | None = None
    latency: float | None = None
    measured: bool = False
    execute: int | None = None
    ensemble: str | None = None
    ensemble_horizon: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in CONTROLS:
            raise RequestError(f"eval.control={self.mode!r} is not known; choose one of {', '.join(CONTROLS)}")
        if self.mode == "blocking" and (self.rate_hz, self.latency) != (None, None):
            raise RequestError(
                "eval.rate_hz and eval.latency need eval.control=realtime: under blocking the world waits"
            )
        if self.rate_hz is not None and self.rate_hz <= 0:
            raise RequestError(f"eval.rate_hz must be positive, got {self.rate_hz}")
        if self.execute is not None and self.execute < 1:
            raise RequestError(f"eval.execute={self.execute}: at least one action of a chunk, or null for all")
        if self.ensemble is not None and self.ensemble not in ENSEMBLES:
            raise RequestError(f"eval.ensemble={self.ensemble} is not known; choose {', '.join(ENSEMBLES)} or null")
        if self.ensemble is not None and (self.mode != "blocking" or self.execute not in (None, 1)):
            raise RequestError("eval.ensemble decides after every action: it needs eval.control=blocking, execute=null")
        if self.ensemble_horizon is not None and (self.ensemble is None or self.ensemble_horizon < 1):
            raise RequestError(
                f"eval.ensemble_horizon={self.ensemble_horizon}: at least 1, beside an eval.ensemble that averages"
            )
        if self.latency is not None and self.latency < 0:
            raise RequestError(f"eval.latency must be at least 0 seconds, got {self.latency}")

    @property
    def delay(self) -> int:
        """Control steps from a picture to its action."""
        if self.mode == "blocking":
            return 0
        assert self.rate_hz is not None
        assert self.latency is not None
        return round(self.rate_hz * self.latency)

    def settle(self, policy: Actor, world_hz: float) -> "Control":
        """Replace None by the world's own rate and by the policy's measured latency."""
        if self.mode == "blocking":
            return self
        measured = self.latency is None
        latency = measure_latency(policy) if self.latency is None else self.latency
        return replace(self, rate_hz=self.rate_hz or world_hz, latency=latency, measured=measured)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        later = ("execute", "ensemble", "ensemble_horizon")  # omitted when unused, as in older results
        settings = {name: value for name, value in asdict(self).items() if name not in later or value is not None}
        return settings | ({"delay": self.delay} if self.latency is not None else {})

    @property
    def smoother(self) -> Ensemble | None:
        """The ensemble that averages several chunks; None if the newest chunk is executed."""
        if self.ensemble is None:
            return None
        ensemble_class = ENSEMBLES[self.ensemble]
        return ensemble_class() if self.ensemble_horizon is None else ensemble_class(self.ensemble_horizon)

    def chosen(self, chunk: NDArray[np.float64]) -> NDArray[np.float64]:
        """The actions of a chunk [T, D] that are executed.

        Raises:
            ValueError: when the chunk has fewer actions than `execute`.
        """
        if self.execute is not None and self.execute > len(chunk):
            raise RequestError(f"eval.execute={self.execute}, but the policy gives {len(chunk)} action(s) at a time")
        return chunk[: self.execute]

    def __str__(self) -> str:
        if self.mode == "blocking":
            how = self.mode if self.execute is None else f"{self.mode}, {self.execute} of a chunk"
            return how if self.ensemble is None else f"{how}, {self.ensemble} ensemble"
        return f"{self.rate_hz:g} Hz, {self.latency:.2f} s latency"


def measure_latency(policy: Actor, repeats: int = 5) -> float:
    """Median seconds from one picture to its action, after two warm-up calls."""
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
        RequestError: when the world does not show an input that the policy needs.
        ValueError: when the policy's answer has another shape.
    """
    if hasattr(policy, "check"):
        with refusing():
            policy.check(observations[0])  # all robots of one world have the same inputs
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


def observed(
    output: Mapping[str, np.ndarray], instruction: str, past: Sequence[Mapping[str, np.ndarray]]
) -> Observation:
    """A world's output as an observation, with `image` as the view `primary`, and `wrist_image` as `wrist`.

    Args:
        output: the world's present output.
        instruction: the robot's instruction.
        past: the world's outputs one step earlier, two steps earlier, and so on.
    """
    images = {}
    for back, shown in enumerate([output, *past]):
        for key in (key for key in shown if key.endswith("image")):
            camera = key.removesuffix("image").removesuffix("_") or "primary"
            images[f"{camera}@-{back}" if back else camera] = shown[key]
    return Observation(images, instruction, output.get("proprio"))
