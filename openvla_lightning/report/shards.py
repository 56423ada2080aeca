"""One evaluation in shards, each a process or a machine of its own, and their results as those of one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from openvla_lightning.report.results import FILE_NAME, Episode, Results

_FOLDER = re.compile(r"shard_(\d+)_of_(\d+)")
_OWN = ("paths", "logger", "num_workers", "continue_sweep")
"""What of the config may differ between shards."""


class ShardError(ValueError):
    """Shards that are not, or not yet, parts of one evaluation; the message says which and why."""


@dataclass(frozen=True, slots=True)
class EvaluationShard:
    """Every `count`-th episode of an evaluation, beginning with the `index`-th; both count from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `k/n`.

        Raises:
            ShardError: it is not that, or k is not one of 1 to n.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ShardError(f"eval.shard={text}: give k/n, such as 1/4, 2/4, 3/4 and 4/4, one for each part")
        return cls(int(found[1]), int(found[2]))

    def takes(self, number: int) -> bool:
        """Whether the episode with this number, counted from 0, is one of its own."""
        return number % self.count == self.index - 1

    def folder(self, whole: str | Path) -> Path:
        """Where it keeps its own, in the folder of the whole evaluation."""
        return Path(whole) / f"shard_{self.index}_of_{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def shards_in(folder: str | Path) -> list[EvaluationShard]:
    """The shards that have a folder in `folder`, in order."""
    names = [_FOLDER.fullmatch(path.name) for path in Path(folder).glob("shard_*_of_*") if path.is_dir()]
    return sorted(
        (EvaluationShard(int(n[1]), int(n[2])) for n in names if n), key=lambda shard: (shard.count, shard.index)
    )


def merge(folder: str | Path) -> Results:
    """The results of the whole evaluation, from those of its shards below `folder`.

    But for time, for videos, and for the worlds' rounding where a policy's answer depends on who shares its batch, they
    are those of one evaluation without shards.

    Raises:
        ShardError: a shard is missing, not finished, or of another evaluation, naming it.
    """
    folder = Path(folder)
    found = shards_in(folder)
    counts = {shard.count for shard in found}
    if not found:
        raise ShardError(f"{folder} holds no shards: evaluate with eval.shard=1/2 paths.output_dir={folder} first")
    if len(counts) > 1:
        raise ShardError(f"{folder} holds shards of evaluations in {sorted(counts)} parts; remove those of one")
    parts: list[Results] = []
    for index in range(1, found[0].count + 1):
        shard = EvaluationShard(index, found[0].count)
        path = shard.folder(folder)
        if not (path / FILE_NAME).is_file() or not (part := Results.load(path)).complete:
            raise ShardError(f"shard {shard} is not finished; eval.shard={shard} paths.output_dir={folder} plays it")
        parts.append(part)
        if differ := _differences(parts[0], part):
            raise ShardError(f"{path} is of another evaluation than shard 1: {', '.join(differ)} differ")
    sizes = [len(part.episodes) for part in parts]
    if sizes != sorted(sizes, reverse=True) or sizes[0] - sizes[-1] > 1:
        raise ShardError(f"the shards in {folder} hold {sizes} episodes, which are not the parts of one evaluation")
    named = [_within(EvaluationShard(i, len(parts)).folder(""), part.episodes) for i, part in enumerate(parts, 1)]
    episodes = [named[number % len(parts)][number // len(parts)] for number in range(sum(sizes))]
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    first = parts[0]
    return replace(
        first, episodes=episodes, notes=notes, timing=_timing(parts), shard=None, config=_config(first.config)
    )


def _within(folder: Path, episodes: Sequence[Episode]) -> list[Episode]:
    return [replace(e, video=str(folder / e.video)) if e.video else e for e in episodes]


def _differences(one: Results, other: Results) -> list[str]:
    names = ("label", "env", "task_set", "instructions", "seed", "control", "versions", "self_test")
    differ = [name for name in names if getattr(one, name) != getattr(other, name)]
    keys = [key for key in ("sha256", "unnorm_key") if one.checkpoint.get(key) != other.checkpoint.get(key)]
    ones, others = _config(one.config), _config(other.config)
    own = [key for key in sorted({*ones, *others} - set(_OWN)) if ones.get(key) != others.get(key)]
    return [*differ, *(f"checkpoint's {key}" for key in keys), *(f"config's {key}" for key in own)]


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    told = config.get("eval")
    return {**config, "eval": {**told, "shard": None}} if isinstance(told, Mapping) and "shard" in told else {**config}


def _timing(parts: Sequence[Results]) -> dict[str, float]:
    """Seconds and episodes an hour of all shards together; of calls and shares the mean."""
    times = [part.timing for part in parts]
    merged = {}
    for name in dict.fromkeys(name for time in times for name in time):
        values = [time[name] for time in times if name in time]
        merged[name] = round(sum(values) if name in ("seconds", "episodes_per_hour") else fmean(values), 4)
    return merged
