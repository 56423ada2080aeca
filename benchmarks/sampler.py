"""The order of training at full size without the data: 27 datasets and 60 M steps, made from their sizes.

    python benchmarks/sampler.py                 # writes 4 GB below the temporary folder, then removes them
    python benchmarks/sampler.py /big/disk/dry   # keeps them

It prints the time of a training from its indexed datasets to its first sample numbers, in the first run (which selects
steps) and in later runs, the memory, and the rate of sample numbers in one process.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
import psutil
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.images import ImageMode, Pixels
from openvla_lightning.data.oxe.catalogue import dataset_spec
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source.index import Index
from openvla_lightning.statistics import DatasetStatistics

CONF = Path(__file__).parents[1] / "conf"
BATCH, NUMBERS = 2048, 4_000_000
GROWTH = 1.05  # to 60 M steps
# thousands of steps and of trajectories in oxe_magic_soup_plus, approximately as published
SIZES = {
    "fractal20220817_data": (3786.4, 87.2),
    "kuka": (2455.9, 209.9),
    "bridge_orig": (2135.5, 60.1),
    "taco_play": (237.8, 3.6),
    "jaco_play": (78.0, 1.1),
    "berkeley_cable_routing": (42.3, 1.6),
    "roboturk": (187.5, 2.0),
    "viola": (76.3, 0.15),
    "berkeley_autolab_ur5": (97.9, 1.0),
    "toto": (325.7, 1.0),
    "language_table": (7045.5, 442.2),
    "stanford_hydra_dataset_converted_externally_to_rlds": (358.2, 0.57),
    "austin_buds_dataset_converted_externally_to_rlds": (34.1, 0.05),
    "nyu_franka_play_dataset_converted_externally_to_rlds": (44.9, 0.46),
    "furniture_bench_dataset_converted_externally_to_rlds": (3948.1, 5.1),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": (4.0, 0.15),
    "austin_sailor_dataset_converted_externally_to_rlds": (353.1, 0.24),
    "austin_sirius_dataset_converted_externally_to_rlds": (279.9, 0.56),
    "dlr_edan_shared_control_converted_externally_to_rlds": (8.9, 0.1),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": (146.2, 0.63),
    "utaustin_mutex": (361.9, 1.5),
    "berkeley_fanuc_manipulation": (62.6, 0.42),
    "cmu_stretch": (25.0, 0.14),
    "bc_z": (6015.5, 43.3),
    "fmb_dataset": (1137.5, 8.6),
    "dobbe": (1139.9, 5.2),
    "droid": (27044.3, 92.2),
}


class Sizes:
    """A dataset with an index but without shards."""

    def __init__(self, root: Path, name: str, spec: DatasetSpec | None = None) -> None:
        self.name, self.folder, self.spec = name, root / name, spec or dataset_spec(name)

    @cached_property
    def index(self) -> Index:
        """The index that `build` wrote."""
        return Index.open(self.folder)

    @cached_property
    def statistics(self) -> DatasetStatistics:
        """Statistics of a few random actions, with the count of all steps."""
        actions = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
        few = DatasetStatistics.from_array(actions, mask=self.spec.action_mask(7), num_trajectories=1)
        return replace(few, num_transitions=self.index.num_steps, num_trajectories=self.index.num_trajectories)

    def missing(self) -> str | None:
        """The path of the index if it is missing."""
        return None if self.folder.exists() else f"no {self.folder}"

    def prepare(self) -> None:
        """Nothing to do."""

    def measure(self, steps: NDArray[np.int32]) -> DatasetStatistics:
        """The same statistics for any steps."""
        return self.statistics

    def encoded(self, role: str, step: int) -> bytes | None:
        """None: no image is stored."""
        return None

    def image(self, role: str, step: int, size: int, mode: ImageMode = "released") -> Pixels | None:
        """A black image."""
        return None


def build(folder: Path, name: str) -> None:
    """Write the index of a dataset; data that is equal for all steps is one repeated row."""
    steps, trajectories = (round(1000 * GROWTH * thousands) for thousands in SIZES[name])
    action = np.full(7, 0.01, np.float32)
    Index(
        action=np.broadcast_to(action, (steps, 7)),
        proprio=np.zeros((steps, 0), np.float32),
        bounds=np.linspace(0, steps, trajectories + 1).astype(np.int64),
        split=np.zeros(trajectories, np.int16),
        instruction=np.broadcast_to(np.int32(0), steps),
        images={"primary": np.broadcast_to(np.zeros(3, np.int64), (steps, 3))},
        splits=("train",),
        instructions=("pick up the cube",),
    ).save(folder / name)


def datamodule(folder: Path) -> VLADataModule:
    """The mixture of the paper with its curriculum, over the indexes in `folder`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["+experiment=oxe_full"]).data
    mix, curriculum = (OmegaConf.to_container(config[name]) for name in ("mix", "curriculum"))
    return VLADataModule(
        partial(Sizes, folder),
        mix=mix,  # type: ignore[arg-type]
        curriculum=[change | {"after": 180_000} for change in curriculum],  # type: ignore[union-attr, operator]
        collate=list,
        image_size=224,
        global_batch_size=BATCH,
        noop_filter="released",
        num_workers=0,
    )


def measure(folder: Path) -> dict[str, float]:
    """Measurements in a training process."""
    before, peak = _anonymous(), Peak()
    peak.start()
    start = time.perf_counter()
    data = datamodule(folder)
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    numbers: Any = loader.sampler
    data.order(np.array(next(iter(numbers))))
    seconds = time.perf_counter() - start
    start, served = time.perf_counter(), 0
    for batch in numbers:
        served += len(data.order(np.array(batch))[0])
        if served >= NUMBERS:
            break
    rate = served / (time.perf_counter() - start)
    late = 180_000 * BATCH + 10**9  # in the second stage, where resuming counts earlier samples
    start = time.perf_counter()
    data.order(np.arange(late, late + BATCH))
    return {
        "steps": float(sum(len(steps) for steps in data.train.values())),
        "seconds": seconds,
        "rate": rate,
        "resume": time.perf_counter() - start,
        "megabytes": (peak.bytes - before) / 1e6,
    }


class Peak(Thread):
    """Peak of this process' own memory, sampled a hundred times per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0.0

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            self.bytes = max(self.bytes, _anonymous())
            time.sleep(0.01)


def _anonymous() -> float:
    """Bytes of this process' own memory, without memory-mapped indexes, which the system can drop."""
    memory = psutil.Process().memory_info()
    return float(memory.rss - memory.shared)


def main(folder: Path) -> None:
    """Build, then measure in two processes one after the other."""
    start = time.perf_counter()
    missing = [name for name in SIZES if not (folder / name).exists()]
    for name in missing:
        build(folder, name)
    table = Table(
        "start", "steps to train on", "start-up", "sample numbers per second", "resume at 1.4 G", "peak memory"
    )
    steps = sum(Index.open(folder / name).num_steps for name in SIZES)
    print(f"{len(SIZES)} datasets, {steps:,} steps; indexes written in {time.perf_counter() - start:.1f} s")
    for name in ("first", "again"):
        command = [sys.executable, __file__, str(folder), "--measure"]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        figures = (f"{found['seconds']:.2f} s", f"{found['rate'] / 1e6:.2f} M", f"{1000 * found['resume']:.0f} ms")
        table.add_row(name, f"{found['steps']:,.0f}", *figures, f"{found['megabytes']:.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder)))
    elif arguments.folder:
        main(arguments.folder)
    else:
        with TemporaryDirectory() as temporary:
            main(Path(temporary))
