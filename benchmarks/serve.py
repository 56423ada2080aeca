"""Load test of a server with a small policy of random weights: latencies, and whether each client gets its own answer.

python benchmarks/serve.py                                    # 1, 8 and 64 clients, HTTP and WebSocket, 10 s each
python benchmarks/serve.py --seconds 600 --clients 64 --transports http

Each client's image encodes its number. The policy's action for it is computed beforehand; any other action is an error.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import httpx
import json_numpy
import numpy as np
import torch

from openvla_lightning.bench_latency import MODELS, random_policy
from openvla_lightning.client import Client

ROOT = Path(__file__).parents[1]
INSTRUCTION = "pick up the red cube"
PROCESSES = 2
"""Number of client processes, each with threads; a single process would limit itself."""


def picture(number: int) -> np.ndarray:
    """The image of a client: uint8 [96, 96, 3], its number as coarse squares."""
    squares = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return squares.repeat(16, 0).repeat(16, 1)


def asking(transport: str, url: str, image: np.ndarray) -> Callable[[], np.ndarray]:
    """A function that asks for one action."""
    if transport == "ws":
        client = Client(url, timeout=60)
        return lambda: client.act(image, INSTRUCTION)
    http = httpx.Client(timeout=60)
    body = json_numpy.dumps({"image": image, "instruction": INSTRUCTION})

    def ask() -> np.ndarray:
        answer = http.post(f"{url}/act", content=body)
        answer.raise_for_status()
        return np.array(answer.json())

    return ask


def robots(
    transport: str, url: str, numbers: list[int], expected: np.ndarray, seconds: float, start: Barrier, results: Any
) -> None:
    """Run clients in threads, which ask again after each answer; put (latencies, wrong, errors) into `results`."""
    import threading

    latencies: list[float] = []
    wrong, errors = [], []

    def robot(number: int) -> None:
        ask = asking(transport, url, picture(number))
        start.wait()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                action = ask()
            except Exception as error:
                errors.append(repr(error))
                continue
            latencies.append(time.perf_counter() - began)
            if not np.array_equal(action, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=robot, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put((latencies, len(wrong), errors))


def load(transport: str, url: str, clients: int, expected: np.ndarray, seconds: float) -> str:
    """Put load on the server; return a line of the table."""
    processes = min(PROCESSES, clients)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(clients), context.Queue()
    workers = [
        context.Process(
            target=robots,
            args=(transport, url, list(range(clients))[first::processes], expected, seconds, start, results),
        )
        for first in range(processes)
    ]
    for worker in workers:
        worker.start()
    parts = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    latencies = np.concatenate([part[0] for part in parts]) * 1e3
    wrong, errors = sum(part[1] for part in parts), [error for part in parts for error in part[2]]
    if errors:
        print(f"{len(errors)} errors, first: {errors[0]}", file=sys.stderr)
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)) if len(latencies) else (np.nan,) * 3
    cells = [transport, str(clients), f"{len(latencies):,}", f"{p50:.1f}", f"{p95:.1f}", f"{p99:.1f}"]
    return " | ".join(["", *cells, f"{len(latencies) / seconds:.0f}", str(wrong), str(len(errors)), ""]).strip()


def main() -> None:
    """Start a server, put load on it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--transports", nargs="+", default=["http", "ws"], choices=["http", "ws"])
    parser.add_argument("--model", default="tiny", choices=sorted(MODELS))
    args = parser.parse_args()
    policy = random_policy(MODELS[args.model], torch.device("cpu"), torch.float32, None)
    with torch.no_grad():  # with larger random weights, answers depend more on the image
        for parameter in policy.vla.parameters():
            parameter.mul_(1.5)
    policy.vla.norm_stats = policy.norm_stats  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        policy.vla.save_pretrained(Path(folder) / "model", policy.processor)
        pictures = [picture(number) for number in range(max(args.clients))]
        expected = np.concatenate([policy.act([image], [INSTRUCTION]) for image in pictures])
        print(f"{len(np.unique(expected, axis=0))} different actions for {len(expected)} clients")
        log = Path(folder) / "log"
        options = ["server.port=0", "server.deadline_ms=60000", "server.max_batch=16"]
        command = [sys.executable, "-m", "openvla_lightning.serve", f"ckpt_path={folder}/model", *options]
        with log.open("w") as output:
            server = subprocess.Popen(
                [*command, f"paths.log_dir={folder}"], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
            )
        try:
            while (ready := re.search(r"Ready: (http://\S+)/act", log.read_text())) is None:
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            print("| transport | clients | answers | p50 ms | p95 ms | p99 ms | answers/s | wrong | errors |")
            print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
            for transport in args.transports:
                for clients in args.clients:
                    print(load(transport, ready[1], clients, expected, args.seconds), flush=True)
            metrics = httpx.get(f"{ready[1]}/metrics").text
            print(*re.findall(r"^process_resident_memory_bytes .*|^openvla_batch_size_(?:sum|count) .*", metrics, re.M))
        finally:
            server.terminate()
            print(f"exit code {server.wait(30)}; {log.read_text()[-300:]}")


if __name__ == "__main__":
    main()
