"""The measurements of `gpu.py`: each function yields lines of its table."""

import chunk  # the benchmark beside this one
import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from openvla_lightning.bench_latency import FORMATS, MODELS, measure, random_policy
from openvla_lightning.cost.cards import card

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "checkpoints"
ACTING = ("full.ckpt", "lora.ckpt", "bins_128.ckpt", "released")
"""Of these the recorded answers are numbers that any device should give: nothing is packed or quantised."""


@dataclass
class Figure:
    """One line of the table.

    Attributes:
        what: description with unit.
        ours, released: the figures; None if there is none.
        more_is_better: True for a rate, False for a duration.
        more: further remarks.
        failed: why there is no figure.
        left_out: what this machine lacks, if there is no figure for that reason.
    """

    what: str
    ours: float | None = None
    released: float | None = None
    more_is_better: bool = True
    more: str = ""
    failed: str = ""
    left_out: str = ""

    def cells(self) -> list[str]:
        """The cells of the table's line."""
        ours, released = ("" if value is None else f"{value:.4g}" for value in (self.ours, self.released))
        times = ""
        if self.ours and self.released:
            times = f"{self.ours / self.released if self.more_is_better else self.released / self.ours:.2f}"
        told = f"FAILED: {self.failed}" if self.failed else f"left out: {self.left_out}" if self.left_out else self.more
        return [self.what, ours, released, times, told]


@dataclass(frozen=True)
class Scale:
    """Size of the measurements: full size on a GPU, or the same code on a CPU.

    Attributes:
        device, dtype: of the acting models.
        model: name in `bench_latency.MODELS`.
        training: configuration of the trained model.
        batches: strategy -> samples per step.
        repeats: number of timed actions.
        rounds: number of timed steps.
    """

    device: str
    dtype: torch.dtype
    model: str
    training: dict[str, Any]
    batches: dict[str, int]
    repeats: int
    rounds: int


def whole() -> Scale:
    """The scale for a GPU."""
    batches = {"lora": 16, "full": 32, "qlora": 16}
    return Scale("cuda", torch.bfloat16, "openvla_7b", train.LARGE, batches, repeats=50, rounds=5)


def tiny() -> Scale:
    """The scale for a CPU, which takes a minute."""
    small = copy.deepcopy(train.SMALL)
    small["llm"]["architecture"]["num_hidden_layers"] = 2
    for tower in small["vision_backbone"]["towers"].values():
        tower["depth"] = 2
    batches = dict.fromkeys(("lora", "full", "qlora"), 1)
    return Scale("cpu", torch.bfloat16, "tiny", small, batches, repeats=2, rounds=1)


def training(scale: Scale, learn: str) -> Iterator[Figure]:
    """Samples per second, share of the peak, and memory; for 4 bits there is no released step."""
    size = scale.batches[learn]
    recompute = "full" if learn == "full" else "none"
    step = partial(train.timed, config=scale.training, device=scale.device, recompute=recompute)
    mine = step(train.ours, learn, size, scale.rounds)
    yield Figure(f"train {learn}, batch {size}: samples/s", mine.rate, more=f"ours {mine}")
    if learn == "qlora":
        return
    if scale.device == "cuda":
        torch.cuda.empty_cache()
    theirs = step(train.released, learn, size, scale.rounds)
    both = f"ours {mine}; released {theirs}; losses {mine.loss:.3f} and {theirs.loss:.3f}"
    yield Figure(f"train {learn}, batch {size}: samples/s", mine.rate, theirs.rate, more=both)


def latency(scale: Scale, format_name: str | None) -> Iterator[Figure]:
    """Milliseconds per action; with unquantised weights also for the released method."""
    device, plain = torch.device(scale.device), format_name is None
    format_ = None if format_name is None else FORMATS[format_name]()
    try:
        if format_ is not None:
            format_.check(device, scale.dtype)
    except ValueError as error:
        yield Figure(f"act {format_name}: ms", left_out=str(error))
        return
    policy = random_policy(MODELS[scale.model], device, scale.dtype, format_)
    hardware = card(torch.cuda.get_device_name()) if scale.device == "cuda" else None
    row = measure(scale.model, policy, scale.repeats, baseline=plain, hardware=hardware)
    name = format_name or str(scale.dtype).removeprefix("torch.")
    theirs = row.baseline or [float("nan")]
    stages = ", ".join(f"{stage} {1e3 * np.median(taken):.1f}" for stage, taken in row.stages.items() if taken)
    limit = "" if row.bound is None else f"; the hardware's bound {1e3 * row.bound:.1f} ms"
    for share in (50, 95):
        mine, other = (1e3 * float(np.percentile(values, share)) for values in (row.actions, theirs))
        more = f"{stages}; {row.memory / 1e9:.1f} GB{limit}" if share == 50 else ""
        yield Figure(f"act {name}, p{share}: ms", mine, other if plain else None, more_is_better=False, more=more)


def chunks(scale: Scale) -> Iterator[Figure]:
    """Time of a chunk of eight actions, for one and sixteen at a time, with each head."""
    ways = chunk.measure(scale.model, torch.device(scale.device), scale.dtype, max(2, scale.repeats // 3), 10)
    theirs = ways[0][1]
    for what, seconds, count in ways[1:]:
        other = 1e3 * theirs if what == "L1" else None
        yield Figure(f"chunk {what}: ms", 1e3 * seconds, other, False, f"{count / seconds:.1f} actions/s")


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """JPEG pictures of 256 px, decoded and resized as in training."""

    def __init__(self, count: int) -> None:
        import simplejpeg

        noise = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
        smooth = [np.kron(picture, np.ones((16, 16, 1), np.uint8)) for picture in noise]
        self.encoded, self.count = [simplejpeg.encode_jpeg(picture, 95) for picture in smooth], count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> torch.Tensor:
        from openvla_lightning.data.images import load

        return torch.from_numpy(load(self.encoded[number % len(self.encoded)], 224))


def data(scale: Scale) -> Iterator[Figure]:
    """Pictures per second from all cores while the device computes, and the device's loss of speed."""
    gpu, cores = scale.device == "cuda", len(os.sched_getaffinity(0))
    side = 8192 if gpu else 64
    matrix = torch.randn(side, side, device=scale.device, dtype=scale.dtype)

    def products(seconds: float) -> float:
        """Products per second."""
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            for _ in range(10):
                matrix @ matrix
            count += 10
            if gpu:
                torch.cuda.synchronize()
        return count / (time.perf_counter() - started)

    seconds = 5.0 if gpu else 0.5
    alone = products(seconds)
    workers = cores if gpu else 1
    loader = torch.utils.data.DataLoader(
        Pictures(10**6), 64, num_workers=workers, multiprocessing_context="fork", pin_memory=gpu
    )
    batches = iter(loader)
    for _ in range(workers if gpu else 1):
        next(batches)
    started, served, beside = time.perf_counter(), 0, []
    while time.perf_counter() - started < seconds:
        next(batches).to(scale.device, non_blocking=True)
        served += 64
        beside.append(products(0.01))
    rate = served / (time.perf_counter() - started)
    more = f"{workers} workers; the device's products beside it {np.median(beside) / alone:.0%} of those alone"
    yield Figure("data: 256 px pictures/s", rate, more=more)


def parity(scale: Scale) -> Iterator[Figure]:
    """Share of small checkpoints' recorded answers that this device reproduces, in float32 and in bfloat16."""
    from PIL import Image

    from openvla_lightning.policy import Policy

    recorded = json.loads((GOLDEN / "answers.json").read_text())
    asked = recorded["requests"]
    pictures = [np.asarray(Image.open(GOLDEN / f"picture_{request['picture']}.png")) for request in asked]
    words = [request["instruction"] for request in asked]
    for dtype in ("float32", "bfloat16"):
        same, far = [], 0.0
        for name in ACTING:
            answer = recorded["answers"][name]
            policy = Policy.from_pretrained(
                GOLDEN / name,
                answer["unnorm_key"],
                device=scale.device,
                dtype=dtype,
                base=GOLDEN / answer["base"] if answer["base"] else None,
            )
            found, expected = policy.act(pictures, words), np.array(answer["actions"])
            same.append(float(np.isclose(found, expected, rtol=0, atol=1e-6).mean()))
            far = max(far, float(np.abs(found - expected).max()))
        more = f"{len(same)} checkpoints; largest difference {far:.2g}"
        yield Figure(f"golden answers, {dtype}: share of equal numbers", float(np.mean(same)), more=more)
