"""All measurements of the project that need a GPU, most important first, in at most eight minutes.

    python benchmarks/gpu.py                # on one GPU of 80 GB or more: writes gpu.json and gpu.md as figures come
    python benchmarks/gpu.py --dry          # what would be measured, and when
    python benchmarks/gpu.py --tiny         # the same code with tiny models, on a CPU
    python benchmarks/gpu.py --only train   # those whose name contains a word

Weights are random and made on the device. Every measurement is a separate process with a time limit, so a failure, a
hang or lack of memory affects only that measurement. If the released code has the same function, it is measured in the
same run. `gpu_wheels.sh` collects the packages for a machine without network.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_figures import Figure, Scale, chunks, data, latency, parity, tiny, training, whole

from openvla_lightning.report.tables import markdown

HEADER = ["what", "ours", "released way", "times", "more"]


@dataclass
class Job:
    """A measurement.

    Attributes:
        name: name for `--only`.
        run: yields its figures; called in a separate process.
        seconds: expected time on the GPU.
        limit: time after which it is stopped.
    """

    name: str
    run: Callable[[], Iterator[Figure]]
    seconds: float
    limit: float = field(default=0.0)

    def __post_init__(self) -> None:
        self.limit = self.limit or 2 * self.seconds


def jobs(scale: Scale) -> list[Job]:
    """Most important first; seconds are for one H100 or H200."""
    return [
        Job("act bfloat16", partial(latency, scale, None), 45),
        Job("train lora", partial(training, scale, "lora"), 75),
        Job("chunk", partial(chunks, scale), 70),
        Job("train full", partial(training, scale, "full"), 75),
        Job("parity", partial(parity, scale), 15, 40),
        Job("train qlora", partial(training, scale, "qlora"), 40),
        Job("act int4_weight", partial(latency, scale, "int4_weight"), 30),
        Job("act fp8", partial(latency, scale, "fp8"), 30),
        Job("act int8", partial(latency, scale, "int8"), 25),
        Job("act int4", partial(latency, scale, "int4"), 25),
        Job("act int8_weight", partial(latency, scale, "int8_weight"), 25),
        Job("data", partial(data, scale), 15, 40),
    ]


def run(job: Job, limit: float) -> list[Figure]:
    """Run a job in a separate process; return its figures, and the reason if some are missing."""
    context = multiprocessing.get_context("fork")  # imports are shared; this process never touches the GPU
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(job.run, theirs))
    process.start()
    theirs.close()
    found: dict[str, Figure] = {}
    until, end = time.monotonic() + limit, ""
    while not end:
        if not ours.poll(max(0.0, until - time.monotonic())):
            end = f"stopped after {limit:.0f} s"
            break
        try:
            said = ours.recv()
        except EOFError:
            end = "the process died"
            break
        if isinstance(said, Figure):
            found[said.what] = said
        else:
            end = said or "done"
    process.join(2) if end == "done" else process.kill()
    process.join()
    figures = list(found.values())
    return figures if end == "done" else [*figures, Figure(job.name, failed=end)]


def _worker(measurement: Callable[[], Iterator[Figure]], pipe: Any) -> None:
    try:
        for figure in measurement():
            pipe.send(figure)
        pipe.send("")
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def machine(scale: Scale) -> str:
    """Description of the machine, from a separate process, because a process that forks must not touch the GPU."""
    if scale.device != "cuda":
        return f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        if not pool.apply(torch.cuda.is_available):
            raise SystemExit("torch sees no GPU here; a machine with one is needed, or --tiny, which needs none")
        name = pool.apply(torch.cuda.get_device_name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def write(folder: Path, where: str, figures: list[Figure], seconds: dict[str, float]) -> str:
    """Write both files, complete after every job; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{where}\n\n{markdown([HEADER, *(figure.cells() for figure in figures)])}\n"
    known = {"machine": where, "figures": [asdict(figure) for figure in figures], "seconds": seconds}
    for name, content in (("gpu.json", json.dumps(known, indent=1)), ("gpu.md", text)):
        (folder / f".{name}").write_text(content, encoding="utf-8")
        (folder / f".{name}").replace(folder / name)
    return text


def plan(chosen: list[Job], budget: float) -> str:
    """The start of each job, and whether all of them fit into the budget."""
    rows, begins = [["job", "begins at, s", "takes, s", "is stopped after, s"]], 0.0
    for job in chosen:
        rows.append([job.name, f"{begins:.0f}", f"{job.seconds:.0f}", f"{min(job.limit, budget - begins):.0f}"])
        begins += job.seconds
    return f"{markdown(rows)}\n\n{begins:.0f} s of {budget:.0f}: {'fits' if begins <= budget else 'DOES NOT FIT'}"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--dry", action="store_true", help="say what would be measured when")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--seconds", type=float, default=480, help="for everything; what does not fit is left out")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    told = parser.parse_args()
    scale = tiny() if told.tiny else whole()
    chosen = [job for job in jobs(scale) if told.only in job.name]
    if told.dry:
        print(plan(chosen, told.seconds))
        return
    where, figures, seconds = machine(scale), list[Figure](), dict[str, float]()
    begun, text = time.monotonic(), ""
    for job in chosen:
        left = told.seconds - (time.monotonic() - begun)
        started = time.monotonic()
        if left > 5:
            figures += run(job, left if told.tiny else min(job.limit, left))
        else:
            figures.append(Figure(job.name, failed="no time was left"))
        seconds[job.name] = round(time.monotonic() - started, 1)
        text = write(told.out, where, figures, seconds)
        print(f"{job.name}: {seconds[job.name]} s", flush=True)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
