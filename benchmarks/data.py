"""Speed of the data pipeline compared with its upper limit, on one CPU core.

    python benchmarks/data.py                            # a corpus of made-up pictures
    OPENVLA_GOLDEN=/path/to/golden python benchmarks/data.py    # real Bridge pictures, as stored and enlarged to 256 px

Rates are frames per core-second (of the process' CPU time), medians over windows. The upper limit is decoding and
resizing the same images in a bare loop of the same run; a pipeline adds finding, reading, normalising and stacking.
Memory is the process' increase since before it opened the dataset.

    python benchmarks/data.py --released ENV/bin/python REPO     # beside the released pipeline, windows taking turns
    python benchmarks/data.py --beside CHECKOUT                  # beside another version of this code

REPO is a clone of openvla/openvla. ENV has TensorFlow 2.15 and nothing of this project's:

    python3.11 -m venv ENV
    ENV/bin/pip install tensorflow-cpu==2.15.0 tensorflow-datasets==4.9.3 tensorflow-metadata==1.14.0 numpy==1.26.4
    ENV/bin/pip install --no-deps git+https://github.com/moojink/dlimp_openvla
"""

import argparse
import io
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import psutil
import tensorflow_datasets as tfds
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.table import Table
from served import Served, answer, per_core_second

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.images import load
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.writer import write_rlds
from openvla_lightning.types import Batch, Step

SIZE, BATCH, STEPS, WINDOWS = 224, 64, 10, 7
CONF = Path(__file__).parents[1] / "conf"
PAPER: Any = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "augment" / "openvla.yaml"))

F = tfds.features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trajectories", type=int, default=300, help="of the 256 px corpus")
    parser.add_argument("--picture", type=Path, default=None, help="where to draw a bar chart")
    parser.add_argument("--released", nargs=2, metavar=("PYTHON", "REPO"), help="compare with the released pipeline")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="compare with another version of this code")
    parser.add_argument("--buffer", type=int, default=1000, help="frames that the released pipeline shuffles")
    parser.add_argument("--rounds", type=int, default=7, help="windows of each pipeline when comparing")
    parser.add_argument("--serve", nargs=3, metavar=("ROOT", "NAME", "AUGMENT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        root, name, augment = arguments.serve
        data = opened(Path(root), name, augment=PAPER if augment == "True" else None)
        answer(endless(data, augment == "True"))
        return
    with TemporaryDirectory() as folder:
        corpora = {256: enlarged(Path(folder), arguments.trajectories)}
        if golden := os.environ.get("OPENVLA_GOLDEN"):
            sample = Path(folder) / "bridge_dataset"
            shutil.copytree(Path(golden) / "data" / "bridge_sample" / "bridge_dataset", sample)
            corpora[64] = "bridge_dataset"
        if arguments.released or arguments.beside:
            compare(Path(folder), dict(sorted(corpora.items())), arguments)
            return
        found = {size: measure(Path(folder), name) for size, name in sorted(corpora.items())}
    show(found)
    if arguments.picture:
        draw(found, arguments.picture)


def enlarged(root: Path, trajectories: int) -> str:
    """Write the 256 px corpus; return its name."""
    pictures = list(islice(frames(), 200))
    features = F.FeaturesDict(
        {
            "steps": F.Dataset(
                {
                    "observation": F.FeaturesDict({"image": F.Image(shape=(256, 256, 3), encoding_format="jpeg")}),
                    "action": F.Tensor(shape=(7,), dtype=np.float32),
                    "language_instruction": F.Text(),
                }
            )
        }
    )
    rng = np.random.default_rng(0)

    def episode(split: str, index: int) -> dict[str, Any]:
        words = {"language_instruction": f"put thing {index % 50} away"}
        shown = [pictures[(index * STEPS + t) % len(pictures)] for t in range(STEPS)]
        return {
            "steps": [{"observation": {"image": image}, "action": rng.random(7, np.float32)} | words for image in shown]
        }

    write_rlds(root / "enlarged" / "1.0.0", features, {"train": trajectories}, episode, workers=0, progress=False)
    return "enlarged"


def frames() -> Iterator[bytes]:
    """256 px JPEGs with the statistics of photographs: Bridge's, or sums of smooth noise."""
    rng = np.random.default_rng(0)
    golden = os.environ.get("OPENVLA_GOLDEN")
    stored = np.load(Path(golden) / "data" / "bridge" / "golden_bridge.npz") if golden else None
    while True:
        for number in range(10):
            if stored is not None:
                image = Image.fromarray(stored[f"images/{number:02d}/decoded"])
            else:
                image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            pixels = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC), np.int16)
            grain = rng.normal(0, 3, pixels.shape).astype(np.int16)
            Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(
                jpeg := io.BytesIO(), "JPEG", quality=95
            )
            yield jpeg.getvalue()


def collate(steps: list[Step]) -> Batch:
    """A batch without text, like the released figures."""
    pixels = torch.from_numpy(np.stack([step.observation.images["primary"] for step in steps])).permute(0, 3, 1, 2)
    actions = torch.from_numpy(np.stack([step.action for step in steps]))
    ids = torch.zeros(len(steps), 1, dtype=torch.long)
    return Batch(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=ids.bool(),
        places=ids[:, :0],
        labels=ids,
        actions=actions,
        numbers=[step.number for step in steps],
    )


def opened(root: Path, name: str, **options: Any) -> VLADataModule:
    """The dataset as training opens it."""
    datasets = {"enlarged": {"cameras": {"primary": "image"}}} if name == "enlarged" else {}
    data = VLADataModule(
        partial(RLDS, root), {name: 1.0}, collate, SIZE, BATCH, datasets=datasets, num_workers=0, **options
    )
    data.prepare_data()
    data.setup()
    return data


def measure(root: Path, name: str) -> dict[str, float]:
    """All figures of one corpus."""
    started = time.process_time()
    index = opened(root, name).sources[name].index
    found = {"indexing": index.num_trajectories / (time.process_time() - started)}

    held = psutil.Process().memory_info().rss
    began = time.perf_counter()
    data = opened(root, name)
    next(iter(data.train_dataloader()))
    found["first batch"] = time.perf_counter() - began

    source = data.sources[name]
    stored = [encoded for step in range(min(400, index.num_steps)) if (encoded := source.encoded("primary", step))]
    augmented, fast = opened(root, name, augment=PAPER), opened(root, name, images="fast")
    stages = {
        "ceiling": lambda: sum(load(encoded, SIZE).size > 0 for encoded in stored),
        "pipeline": endless(data),
        "augmented": endless(augmented, augment=True),
        "fast": endless(fast),
    }
    rates: dict[str, list[float]] = {stage: [] for stage in stages}
    for window in range(WINDOWS + 1):
        for stage, serve in stages.items():
            rate = per_core_second(serve, 1.0)
            if window:  # the first warms up
                rates[stage].append(rate)
    found |= {stage: statistics.median(values) for stage, values in rates.items()}
    return found | {"memory": (psutil.Process().memory_info().rss - held) / 1e9}


def endless(data: VLADataModule, augment: bool = False) -> Callable[[], int]:
    """A function that serves the next batch, endlessly."""

    def batches() -> Iterator[Batch]:
        while True:
            for batch in data.train_dataloader():
                yield batch
                data.samples_served += BATCH

    source = batches()

    def serve() -> int:
        batch = next(source)
        if augment:
            assert data.augmentation is not None
            data.augmentation(batch.pixel_values, torch.from_numpy(data.augmentation.draws(data.seed, batch.numbers)))
        return len(batch)

    return serve


def compare(root: Path, corpora: Mapping[int, str], arguments: argparse.Namespace) -> None:
    """Alternate windows of all pipelines, and print a table of their rates and of our relative rate."""
    table = Table("images", title=f"Frames per core-second, {SIZE} px, medians of {arguments.rounds}; ratios (range)")
    here = Path(__file__)
    for size, name in corpora.items():
        opened(root, name)  # index and measure before timing starts
        for augment in (False, True):
            other: dict[str, Served] = {}
            if arguments.released:
                python, repo = arguments.released
                told = [repo, root, name, SIZE, augment, arguments.buffer]
                script = here.with_name("released_data.py")
                other["released"] = Served([python, script, *map(str, told)], {"TF_CPP_MIN_LOG_LEVEL": "2"})
            command = [sys.executable, here, "--serve", root, name, str(augment)]
            if arguments.beside:
                other["beside"] = Served(command, {"PYTHONPATH": str(arguments.beside.resolve())})
            served = other | {"ours": Served(command, {"PYTHONPATH": str(here.parents[1])})}
            rates: dict[str, list[float]] = {who: [] for who in served}
            for window in range(arguments.rounds + 1):
                for who, process in served.items():
                    rate = process.window(1.0)
                    if window:  # the first warms up
                        rates[who].append(rate)
            for process in served.values():
                process.close()
            cells = [f"{statistics.median(found):,.0f}" for found in rates.values()]
            for who in other:
                ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[who], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.1f} to {max(ratios):.1f})")
            if not table.rows:
                for title in [*rates, *(f"ours / {who}" for who in other)]:
                    table.add_column(title, justify="right")
            table.add_row(f"{size} px{', augmented' if augment else ''}", *cells)
    Console(width=110).print(table)


def show(found: dict[int, dict[str, float]]) -> None:
    """Print the table."""
    table = Table("figure", title="Data pipeline, 224 px, one core", title_justify="left")
    for size in found:
        table.add_column(f"{size} px JPEGs", justify="right")
    rows: dict[str, Callable[[int, dict[str, float]], str]] = {
        "decode + resize alone (the ceiling), frames per core-second": lambda _, f: f"{f['ceiling']:,.0f}",
        "pipeline": lambda _, f: f"{f['pipeline']:,.0f}",
        "  share of the ceiling": lambda _, f: f"{f['pipeline'] / f['ceiling']:.0%}",
        "pipeline and the paper's augmentation": lambda _, f: f"{f['augmented']:,.0f}",
        "pipeline, data.images=fast": lambda _, f: f"{f['fast']:,.0f}",
        "first batch of an indexed dataset, seconds": lambda _, f: f"{f['first batch']:.2f}",
        "indexing, trajectories of 10 steps per core-second": lambda _, f: f"{f['indexing']:,.0f}",
        "memory of the four pipelines, GB": lambda _, f: f"{f['memory']:.2f}",
    }
    for title, cell in rows.items():
        table.add_row(title, *(cell(size, figures) for size, figures in found.items()))
    Console().print(table)


def draw(found: dict[int, dict[str, float]], path: Path) -> None:
    """Draw bars, and the upper limit as a line."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3.2), squeeze=False, layout="constrained")
    for axis, (size, figures) in zip(axes[0], found.items(), strict=True):
        bars = {
            "pipeline": figures["pipeline"],
            "fast": figures["fast"],
            "augmented": figures["augmented"],
        }
        drawn = axis.bar(list(bars), list(bars.values()), color="C0")
        axis.bar_label(drawn, fmt="{:,.0f}")
        axis.axhline(figures["ceiling"], color="k", linewidth=0.8, linestyle="--")
        axis.set(title=f"{size} px JPEGs", ylabel="frames per core-second")
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    L.seed_everything(7, verbose=False)
    main()
