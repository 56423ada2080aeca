"""What every dataset that is indexed once and then read by position has in common."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from openvla_lightning.data.images import Pixels
from openvla_lightning.data.oxe.registry import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.index import Index, save_json
from openvla_lightning.data.source.indexing import BadTrajectories
from openvla_lightning.data.source.processes import worker_pool
from openvla_lightning.data.source.records import BadShardError
from openvla_lightning.statistics import DatasetStatistics

log = logging.getLogger(__name__)


class IndexedSource(Source):
    """Builds an index in one pass, keeps it on disk, and measures its statistics.

    A subclass says what the index depends on (`_home`), makes it (`_build`) and reads images.

    Raises:
        ValueError: `bad_trajectories` is neither `error` nor `skip`.
    """

    def __init__(
        self, name: str, spec: DatasetSpec | None, workers: int | None, bad_trajectories: BadTrajectories
    ) -> None:
        if bad_trajectories not in get_args(BadTrajectories):
            raise ValueError(f"data.source.bad_trajectories={bad_trajectories}: choose error or skip")
        self.name, self.given, self.workers, self.bad_trajectories = name, spec, workers, bad_trajectories

    @property
    def _folder(self) -> Path:
        raise NotImplementedError

    @property
    def _home(self) -> Path:
        raise NotImplementedError

    @property
    def files_key(self) -> str:
        """Changes when a file of the dataset does."""
        raise NotImplementedError

    def run(self, role: str, steps: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """Many pictures of a camera, as recorded: step and uint8 [H, W, 3]; in order where that costs nothing."""
        raise NotImplementedError

    def _build(self) -> tuple[Index, Mapping[str, NDArray[Any]], Mapping[str, Any]]:
        """The index, and arrays and facts to keep beside it."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Index the dataset unless that was done: one pass over its files.

        Raises:
            FileNotFoundError: the dataset is not there.
            BadShardError: something is damaged or missing; with file and trajectory. With
                `bad_trajectories="skip"`, only when nothing is left.
        """
        if not (self._home / "index.json").exists():
            index, arrays, facts = self._build()
            released = self._measure(index, np.flatnonzero(_not_dropped(index, self.spec)), index.num_trajectories)
            texts = {name: json.dumps(content) for name, content in facts.items()}
            index.save(self._home, arrays, dataset_statistics=json.dumps(released.to_dict(), indent=1), **texts)
            self._warn(index)

    @cached_property
    def index(self) -> Index:
        """Every step but its pixels; `prepare` comes first."""
        self.prepare()
        return Index.open(self._home)

    @cached_property
    def statistics(self) -> DatasetStatistics:
        """Over all splits, before any filter but the first steps that the released transform drops."""
        self.prepare()
        return DatasetStatistics.from_json(self._home / "dataset_statistics.json")

    def measure(self, steps: NDArray[np.int32]) -> DatasetStatistics:
        """Statistics of the given steps alone; kept beside the index for the next time, where one may write."""
        index = self.index
        path = self._home / f"statistics_{hashlib.sha256(steps.tobytes()).hexdigest()[:16]}.json"
        if path.exists():
            return DatasetStatistics.from_json(path)
        measured = self._measure(index, steps, len(np.unique(index.trajectory[steps])))
        if os.access(self._home, os.W_OK):
            save_json(path, measured.to_dict())
        return measured

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "index"}

    def _each(self, read: Callable[[Any], Any], jobs: Sequence[Any], label: str, large: bool) -> Iterator[Any]:
        """What `read` makes of every job, in order: by several processes, and with a bar, where it takes long."""
        workers = min(self.workers if self.workers is not None else (os.cpu_count() or 1) * large, len(jobs))
        if workers < 2:
            yield from track(map(read, jobs), label, total=len(jobs), transient=True, disable=not large)
            return
        with worker_pool(workers) as pool:
            yield from track(pool.map(read, jobs), label, total=len(jobs), transient=True)

    def _warn(self, index: Index) -> None:
        if index.skipped:
            few = "".join(
                f"\n    {one['file']}, trajectory {one['trajectory']}: {one['reason']}" for one in index.skipped[:3]
            )
            log.warning(
                f"{self.name}: {len(index.skipped):,} trajectories cannot be read and are left out; "
                f"all of them are listed in {self._home / 'index.json'} under `skipped`. The first:{few}"
            )

    def _measure(self, index: Index, steps: NDArray[Any], trajectories: int) -> DatasetStatistics:
        if not len(steps):
            raise BadShardError(f"{self._folder} holds no step after standardisation")
        return DatasetStatistics.from_array(
            index.action[steps],
            index.proprio[steps] if index.proprio.shape[1] else None,
            mask=self.spec.action_mask(index.action.shape[1]),
            num_trajectories=trajectories,
        )


def _not_dropped(index: Index, spec: DatasetSpec) -> NDArray[np.bool_]:
    kept = np.ones(index.num_steps, bool)
    if spec.drop_first:
        kept[index.bounds[:-1][np.diff(index.bounds) > 0]] = False
    return kept
