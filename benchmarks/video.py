"""Random frames of LeRobot datasets per core-second, by codec and key-frame distance, and from the JPEG cache.

    python benchmarks/video.py
    python benchmarks/video.py --lerobot /path/to/python      # with lerobot installed: its own loader on the same files

Rates are of the process' CPU time, on one core, medians over windows. `cold` opens the dataset and reads the first
frames: no decoder, no packet table, no open file. `warm` then reads randomly over the whole dataset. `in order` reads
neighbouring frames as one run. The library's figure is for its `LeRobotDataset[i]` with one camera; torchcodec's, where
it is installed, is for its decoders alone, one per file, which stay open.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.source.lerobot import LeRobot
from openvla_lightning.data.source.lerobot.encoding import Encoding
from openvla_lightning.data.source.lerobot.film import FRAMES
from openvla_lightning.data.source.lerobot.metadata import Feature
from openvla_lightning.data.source.lerobot.writer import Recording, write_lerobot
from openvla_lightning.data.source.transcoded import Transcoded

EPISODES, STEPS, SIZE, FPS = 8, 300, 256, 30
CAMERA = "observation.images.front"
KINDS = [(codec, gap) for codec in ("h264", "av1") for gap in (2, 250)]
WINDOW, WINDOWS = 100, 7
COLUMNS = (
    "codec",
    "key every",
    "cold",
    "warm",
    "in order",
    "224 px",
    "JPEG cache",
    "JPEG 224 px",
    "torchcodec",
    "lerobot",
)
LIBRARY = """
import json, random, statistics, sys, time
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import torch
torch.set_num_threads(1)
data = LeRobotDataset("bench/" + sys.argv[1].rsplit("/", 1)[1], root=sys.argv[1], video_backend=sys.argv[2])
draw, rates = random.Random(0), []
for window in range(int(sys.argv[4])):
    began = time.process_time()
    for _ in range(int(sys.argv[3])):
        data[draw.randrange(len(data))]
    rates.append(int(sys.argv[3]) / (time.process_time() - began))
print(json.dumps(statistics.median(rates)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lerobot", default=None, help="a Python with lerobot, to time its loader beside ours")
    parser.add_argument("--backend", default="pyav", help="of lerobot: pyav, torchcodec")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"random frames per core-second, {SIZE} x {SIZE}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    with TemporaryDirectory() as folder:
        for codec, gap in KINDS:
            root = write(Path(folder), codec, gap)
            rates = [*measure(root), torchcodec(root)]
            rates.append(library(root, arguments.lerobot, arguments.backend) if arguments.lerobot else float("nan"))
            table.add_row(codec, str(gap), *(f"{rate:,.0f}" for rate in rates))
    Console(width=120).print(table)


def write(folder: Path, codec: str, gap: int) -> Path:
    """A dataset of moving, textured pictures."""
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).resize(
        (700, 700), Image.Resampling.BICUBIC
    )
    wide = np.asarray(scene)

    def record(number: int) -> Recording:
        draw = np.random.default_rng(number)
        start, pace = draw.integers(0, 100, 2), draw.uniform(0.1, 1, 2)
        shown = []
        for step in range(STEPS):
            top, left = (start + pace * step).astype(int)
            view = wide[top : top + SIZE, left : left + SIZE].astype(np.int16)
            shown.append((view + draw.normal(0, 3, view.shape).astype(np.int16)).clip(0, 255).astype(np.uint8))
        return Recording({"action": draw.normal(size=(STEPS, 7)).astype(np.float32)}, {CAMERA: shown}, ["go"] * STEPS)

    features = {CAMERA: Feature("video", (SIZE, SIZE, 3)), "action": Feature("float32", (7,))}
    target = folder / f"{codec}_{gap}"
    encoding = Encoding("h264" if codec == "h264" else "av1", gap)
    return write_lerobot(
        target, features, [STEPS] * EPISODES, ["go"], record, fps=FPS, encoding=encoding, workers=0, progress=False
    )


def opened(root: Path) -> LeRobot:
    spec = describe(root.name, {"format": "lerobot", "cameras": {"primary": CAMERA}})
    return LeRobot(root.parent, root.name, spec)


def measure(root: Path) -> list[float]:
    """Rates: cold, warm, in order, resized, and resized from the cache."""
    opened(root).prepare()
    began = time.process_time()
    source = opened(root)
    draw = np.random.default_rng(1)
    for step in draw.integers(0, source.index.num_steps, 20).tolist():
        FRAMES.forget()
        source.pixels("primary", step)
    cold = 20 / (time.process_time() - began)
    cached = Transcoded(opened(root), ["primary"])
    cached.prepare()
    ordered = []
    for window in range(WINDOWS):
        FRAMES.forget()
        began = time.process_time()
        count = sum(1 for _ in source.run("primary", range(window * STEPS, (window + 1) * STEPS)))
        ordered.append(count / (time.process_time() - began))
    return [
        cold,
        rate(source.index.num_steps, lambda step: source.pixels("primary", step)),
        statistics.median(ordered),
        rate(source.index.num_steps, lambda step: source.image("primary", step, 224)),
        rate(source.index.num_steps, lambda step: cached.pixels("primary", step)),
        rate(source.index.num_steps, lambda step: cached.image("primary", step, 224)),
    ]


def rate(steps: int, read: Callable[[int], object]) -> float:
    """Frames per second of CPU time."""
    draw, found = np.random.default_rng(2), []
    for _ in range(WINDOWS):
        began = time.process_time()
        for step in draw.integers(0, steps, WINDOW).tolist():
            FRAMES.forget()  # in a large dataset, the next random frame is rarely a neighbour
            read(step)
        found.append(WINDOW / (time.process_time() - began))
    return statistics.median(found)


def torchcodec(root: Path) -> float:
    """The same of torchcodec's own decoders; not a number where it is not installed."""
    if importlib.util.find_spec("torchcodec") is None:
        return float("nan")
    from torchcodec.decoders import VideoDecoder

    options = {"seek_mode": "approximate", "num_ffmpeg_threads": 1, "dimension_order": "NHWC"}
    decoders = [VideoDecoder(path, **options) for path in sorted(root.rglob("*.mp4"))]
    places = [(decoder, number) for decoder in decoders for number in range(len(decoder))]
    return rate(len(places), lambda step: places[step][0][places[step][1]])


def library(root: Path, python: str, backend: str) -> float:
    """The same rate of lerobot's own dataset."""
    command = [python, "-c", LIBRARY, str(root), backend, str(WINDOW), str(WINDOWS)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr[-2000:])
    return float(json.loads(found.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
