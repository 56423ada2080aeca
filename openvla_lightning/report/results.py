"""What an evaluation found: episodes or held-out steps, their statistics, and `results.json`."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, Self

from openvla_lightning.runtime.files import below, write_text

FILE_NAME = "results.json"
FORMAT = 1
"""Version of the layout of results.json, written into it."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished rollout.

    Attributes:
        task, family, seed: what was set up and judged; with the environment's config they rebuild the scene.
        instruction: what the policy was told, which is another task's in the mode `shuffled`.
        success: as the environment judged.
        length: actions executed, or the time of as many.
        video: path of its MP4 relative to results.json, if one was kept.
        progress: share of the task that was done at the end, 0 to 1, where the world says so; 1 for a success.
        error: how the environment failed, twice; such an episode is neither a success nor a failure.
        jerk: how much the motion jerked, in the world's units (see `evaluation.played.jerk`); None where unknown.
    """

    task: str
    family: str
    seed: int
    instruction: str
    success: bool
    length: int
    video: str | None = None
    progress: float = 0.0
    error: str | None = None
    jerk: float | None = None


@dataclass(frozen=True, slots=True)
class SuccessRate:
    """Successes out of episodes, with the Wilson score interval (Wilson 1927) of the rate.

    Unlike the normal approximation it stays inside [0, 1] and keeps its width at 0 and at all successes.
    `progress` is the mean partial credit. Episodes that ended in an error are in `errors` and nowhere else.
    """

    successes: int
    episodes: int
    mean_length: float = float("nan")
    progress: float = float("nan")
    errors: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.episodes:
            raise ValueError(f"need 0 <= successes <= episodes, got {self.successes} of {self.episodes}")

    @property
    def rate(self) -> float:
        return self.successes / self.episodes if self.episodes else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end; [0, 1] before the first episode."""
        n, p = self.episodes, self.rate
        if not n:
            return 0.0, 1.0
        z = NormalDist().inv_cdf((1 + self.confidence) / 2)
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        # At 0 and n successes the ends are 0 and 1 exactly; rounding alone would move them by 1e-17.
        return (0.0 if self.successes == 0 else centre - half), (1.0 if self.successes == n else centre + half)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "episodes": self.episodes,
            "successes": self.successes,
            "success_rate": self.rate if self.episodes else None,
            "interval_95": [low, high],
            "mean_length": self.mean_length if self.episodes else None,
            "progress": self.progress if self.episodes else None,
            "errors": self.errors,
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.0f} % ({100 * low:.0f}-{100 * high:.0f})" if self.episodes else "-"


def success_rate(episodes: Iterable[Episode]) -> SuccessRate:
    """Pool episodes into one rate."""
    played = list(episodes)
    judged = [episode for episode in played if episode.error is None]
    successes, errors = sum(episode.success for episode in judged), len(played) - len(judged)
    if not judged:
        return SuccessRate(0, 0, errors=errors)
    length, progress = fmean(episode.length for episode in judged), fmean(episode.progress for episode in judged)
    return SuccessRate(successes, len(judged), length, progress, errors)


@dataclass(slots=True)
class Results:
    """One policy's evaluation, everything needed to repeat it included.

    Attributes:
        label: the policy's name in tables (`untrained`, `pretrained`, `fine-tuned`, ...).
        task_set: the tasks' name in tables (`pretraining`, `new`, ...).
        env: name of the environment.
        instructions: `own`, or `shuffled` between episodes.
        control: how time passed while the policy thought, see `openvla_lightning.evaluation.control.Control`.
        self_test: what was found about the world before: name, ok, seen.
        notes: what a reader of the numbers should know, such as versions other than the reference's.
        timing: seconds in all and per call of the policy, episodes per hour, and where the time went (see
            `evaluation.timing.Stopwatch`), of the last call; they differ between two runs of the same evaluation.
        complete: False when the evaluation was interrupted; only finished episodes are listed then.
        offline: token accuracy and L1 on held-out steps, see `openvla_lightning.env.recorded`.
        checkpoint: path, sha256, unnorm_key, normalisation.
        config: the whole resolved config of the run.
        shard: `k/n` of one part of an evaluation, see `report.shards`; None of a whole one.
        verdict: of an evaluation that stops when it is decided: against whom, and `report.sequential.Verdict`.
    """

    label: str
    env: str
    task_set: str = "all"
    instructions: str = "own"
    seed: int = 0
    episodes: list[Episode] = field(default_factory=list)
    offline: dict[str, Any] | None = None
    control: dict[str, Any] = field(default_factory=dict)
    self_test: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True
    timing: dict[str, float] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    shard: str | None = None

    @property
    def overall(self) -> SuccessRate:
        return success_rate(self.episodes)

    @property
    def score(self) -> float:
        """One number for a sweep: the success rate, or on held-out steps the token accuracy, without tokens -L1."""
        if not self.offline:
            return self.overall.rate
        return self.offline.get("token_accuracy", -self.offline["l1"])

    @property
    def families(self) -> dict[str, SuccessRate]:
        return self._grouped(lambda episode: episode.family)

    @property
    def tasks(self) -> dict[str, SuccessRate]:
        return self._grouped(lambda episode: episode.task)

    def _grouped(self, key: Callable[[Episode], str]) -> dict[str, SuccessRate]:
        groups: dict[str, list[Episode]] = {}
        for episode in self.episodes:
            groups.setdefault(key(episode), []).append(episode)
        return {name: success_rate(group) for name, group in groups.items()}

    @property
    def row(self) -> str:
        """Name of this result's row in a comparison."""
        name = self.label if self.instructions == "own" else f"{self.label}, {self.instructions} instructions"
        if self.control.get("mode") != "realtime":
            return name
        return f"{name}, {self.control['rate_hz']:g} Hz, {self.control['latency']:.2f} s"

    def save(self, folder: str | Path) -> Path:
        """Write `folder/results.json` atomically and return its path."""
        content = {"format": FORMAT, **asdict(self)}
        if self.episodes:
            content["summary"] = {
                "overall": self.overall.to_dict(),
                "families": {name: rate.to_dict() for name, rate in self.families.items()},
                "tasks": {name: rate.to_dict() for name, rate in self.tasks.items()},
            }
        path = Path(folder) / FILE_NAME
        write_text(path, json.dumps(content, indent=1, default=str) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; `path` is the file or its folder.

        Raises:
            ValueError: when the file is not a results.json of this format.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, expected {FORMAT}")
            names = set(cls.__dataclass_fields__)
            fields = {name: value for name, value in content.items() if name in names}
            return cls(**{**fields, "episodes": [Episode(**episode) for episode in fields["episodes"]]})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the results.json of an evaluation: {error}") from None


def acting_rate(results: Sequence[Results]) -> float | None:
    """Actions for each second in which the policy worked, over several evaluations; None where it was not measured."""
    timed = [result.timing for result in results if "actions_per_call" in result.timing]
    seconds = sum(timing["seconds_per_call"] for timing in timed)
    return sum(timing["actions_per_call"] for timing in timed) / seconds if seconds else None


def find_results(paths: Sequence[str | Path]) -> list[Path]:
    """Every results.json at or below `paths`, in the order of `paths`, then oldest first, each once.

    Raises:
        FileNotFoundError: when there is none.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        there = sorted(below(path, FILE_NAME), key=lambda file: (file.stat().st_mtime_ns, file))
        found |= dict.fromkeys([path] if path.is_file() else there)
    if not found:
        raise FileNotFoundError(
            f"no {FILE_NAME} in {', '.join(map(str, paths))}: evaluate something first, with `python evaluate.py`"
        )
    return list(found)
