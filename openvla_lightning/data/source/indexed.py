"""Base class of datasets that are indexed once and then read by position."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import Pixels
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source import index as index_module
from openvla_lightning.data.source.faults import BadShardError, BadTrajectories, first_of
from openvla_lightning.data.source.index import Index
from openvla_lightning.runtime.files import alone, delete, readable, write_json
from openvla_lightning.statistics import DatasetStatistics

log = logging.getLogger(__name__)


class IndexedSource(Source):
    """Builds an index in one pass, keeps it on disk, and measures its statistics.

    A subclass locates the files (`_folder`, `_stamps`), builds the index (`_build`) and reads images.
    All formats have these arguments.

    Args:
        root: the data directory, or any URL that fsspec understands: gs://, s3://, https://, file://.
        name: the dataset's name in the mixture, and its folder below `root`.
        spec: the dataset's description; None: the registered one of `name`.
        workers: processes that index; None: one per core for large datasets, none for small ones.
        bad_trajectories: treatment of unreadable trajectories: `error` stops at the first one, `skip` leaves them
            out and lists them in the index and its data report.
        check_images: decode every image while indexing, instead of checking only its first and last bytes.
        cache_dir: folder for the files of a URL, and for the indexes of folders that are not writable; None: the
            user's cache.
        cache_gb: gigabytes of downloaded files kept there at once, over all datasets.

    Raises:
        ValueError: `bad_trajectories` has another value; `cache_gb` is not above 0.
    """

    def __init__(
        self,
        root: str | Path,
        name: str,
        spec: DatasetSpec | None = None,
        workers: int | None = None,
        bad_trajectories: BadTrajectories = "error",
        check_images: bool = False,
        cache_dir: str | Path | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        if bad_trajectories not in get_args(BadTrajectories):
            raise ValueError(f"data.source.bad_trajectories={bad_trajectories}: choose error or skip")
        self.root, self.name, self.given, self.workers = root, name, spec, workers
        self.bad_trajectories, self.check_images = bad_trajectories, check_images
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.cache_gb = cache_gb
        self._set_up()

    def _set_up(self) -> None:
        """Initialise what the format needs, without reading any file."""

    @property
    def _folder(self) -> Path:
        raise NotImplementedError

    @property
    def _stamps(self) -> Mapping[str, tuple[int, int]]:
        """Name of each file -> bytes and time of the last write, as found at the start; stores give only bytes."""
        raise NotImplementedError

    def _build(self) -> tuple[Index, Mapping[str, NDArray[Any]], Mapping[str, Any]]:
        """The index, and arrays and facts to keep beside it."""
        raise NotImplementedError

    def run(self, role: str, steps: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """Many recorded images of a camera: step and uint8 [H, W, 3]; steps without an image are left out.

        They come in the order of `steps` if that costs no time.
        """
        for step in steps:
            if (pixels := self.pixels(role, step)) is not None:
                yield step, pixels

    def chroma_repeated(self, role: str, step: int) -> bool:
        """Whether every 2 x 2 pixels of a picture that was just read have the same chroma."""
        return False

    def prepare(self) -> None:
        """Index the dataset, if not done before, in one pass over its files. An interrupted pass is resumed.

        Raises:
            FileNotFoundError: the dataset is not there.
            PermissionError: there is no writable place for the index; raised before the pass.
            BadShardError: a file is damaged or missing, an action is not finite, a key is missing, or an image is cut
                short; the message names file and trajectory. With `bad_trajectories="skip"`, only if nothing is left.
        """
        home = self._home
        if readable(home / "index.json"):
            return
        try:
            with alone(home.parent / f".{home.name}.lock", f"indexing {self.name}"):
                if readable(home / "index.json"):
                    return
                index, arrays, facts = self._build()
                moved = np.flatnonzero(_not_dropped(index, self.spec))
                released = self._measure(index, moved, index.num_trajectories)
                texts = {name: json.dumps(content) for name, content in facts.items()}
                index.save(home, arrays, dataset_statistics=json.dumps(released.to_dict(), indent=1), **texts)
                delete(self._kept)
                for older in home.parent.glob(f"{self._description}*"):
                    if older != home:  # index of an older state of the files
                        delete(older)
        except ValueError:
            with suppress(OSError):  # the folder may hold other indexes
                home.parent.rmdir()
            raise
        if index.skipped:
            log.warning(
                f"{self.name}: {len(index.skipped):,} trajectories cannot be read and are left out; all of them are "
                f"listed in {home / 'index.json'} under `skipped`. The first{first_of(index.skipped, 3)}"
            )

    @cached_property
    def index(self) -> Index:
        """All data of every step except pixels; call `prepare` first."""
        self.prepare()
        return Index.open(self._home)

    @cached_property
    def statistics(self) -> DatasetStatistics:
        """Statistics over all splits, before filters, but without first steps that the released transform drops."""
        self.prepare()
        return DatasetStatistics.from_json(self._home / "dataset_statistics.json")

    def measure(self, steps: NDArray[np.int32]) -> DatasetStatistics:
        """Statistics of the given steps only; stored beside the index for the next run, if that is writable."""
        index = self.index
        path = self._home / f"statistics_{hashlib.sha256(steps.tobytes()).hexdigest()[:16]}.json"
        if path.exists():
            return DatasetStatistics.from_json(path)
        measured = self._measure(index, steps, len(np.unique(index.trajectory[steps])))
        if os.access(self._home, os.W_OK):
            write_json(path, measured.to_dict())
        return measured

    @property
    def files_key(self) -> str:
        """A hash that changes when a file of the dataset changes."""
        return hashlib.sha256(repr(sorted(self._stamps.items())).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("index", "_facts")}

    @cached_property
    def _home(self) -> Path:
        return index_module.home_of(self._description + self.files_key[:8], self._folder, self.name, self.cache_dir)

    @property
    def _description(self) -> str:
        """Common start of the names of all indexes with the same description and version of the reader."""
        known = (index_module.VERSION, self.spec.fingerprint, self.bad_trajectories, self.check_images)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:8]

    @property
    def _kept(self) -> Path:
        """Folder with the results of an interrupted pass."""
        return self._home.parent / f".{self._description}.pass"

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return {}

    def _fact(self, name: str) -> Any:
        """The fact `name` that `_build` returned."""
        if name not in self._facts:
            self.prepare()
            self._facts[name] = json.loads((self._home / f"{name}.json").read_text(encoding="utf-8"))
        return self._facts[name]

    def _check_unchanged(self, name: str, now: os.stat_result) -> None:
        if name in self._stamps and self._stamps[name] != (now.st_size, now.st_mtime_ns):
            raise BadShardError(
                f"{self._folder / name} was written to after it was indexed: start again, so that it is indexed anew"
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
