"""Calculated needs of full training of openvla-7b on 1, 8, 64 and 512 GPUs.

    python benchmarks/scale.py
    python benchmarks/scale.py --ranks   # 512 processes' shares of the order of training, at its full size

Communication is the number of bytes that each GPU receives per optimiser step. FSDP gathers the bfloat16 weights for
the forward and again for the backward pass of every accumulated batch, and sums its float32 gradients: (2 x 2 + 4)
bytes per parameter, minus the GPU's own share. HSDP does the same inside a node, over the fast links; between nodes,
each GPU sums only its shard of the gradients with an all-reduce, once per step.
"""

import argparse
import time
from dataclasses import dataclass
from functools import cache

import numpy as np

from openvla_lightning.action_head import TokenHead
from openvla_lightning.bench_latency import MODELS
from openvla_lightning.cost.cards import card
from openvla_lightning.cost.estimate import USUAL_NODE, UTILISATION, Estimate, Spread, estimate
from openvla_lightning.data.loader import BatchNumbers
from openvla_lightning.data.mixture import GlobalOrder, Stage
from openvla_lightning.model import VLA
from openvla_lightning.report.tables import markdown
from openvla_lightning.strategy import TrainOnly

CARD, PRICE = "H100", 2.5
"""The card, and its price in dollars per hour."""
SAMPLES = 150_000 * 2048
"""Samples in the paper's training."""
GLOBAL_BATCH, PER_DEVICE = 2048, 32
INSIDE, BETWEEN, DISK = 450e9, 50e9, 5e9
"""Bytes per second that a GPU receives inside its node (NVLink) and from other nodes (400 Gb/s each), and that a node
writes to storage."""
PICTURE = 40e3
"""Bytes of a stored JPEG picture of 256 px."""
HEADER = [
    *("GPUs", "kind", "GB a GPU", "fits", "GB received a step, in node", "between nodes", "s of it a step", "s a step"),
    *("samples/s", "MFU", "days", "$", "s a checkpoint", "MB/s of pictures a node"),
]


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU receives per optimiser step, and their time."""

    inside: float
    between: float

    @property
    def seconds(self) -> float:
        """Seconds of communication; both networks work at the same time, but gradients wait for the sum in the node."""
        return self.inside / INSIDE + self.between / BETWEEN


def traffic(parameters: int, devices: int, replicas: int, batches: int) -> Traffic:
    """The traffic per step; see the module's docstring.

    Args:
        parameters: number of parameters; all of them learn.
        devices: number of all devices.
        replicas: number of groups that hold a whole model each; 1: FSDP over all devices.
        batches: accumulated batches per step.
    """
    group = devices // replicas
    if group == 1 and replicas == 1:
        return Traffic(0, 0)
    weights, gradients = 2 * 2.0 * parameters * batches, 4.0 * parameters * batches
    gathered = (weights + gradients) * (group - 1) / group
    far = 2 * 4.0 * parameters / group * (replicas - 1) / replicas  # an all-reduce of each shard, once per step
    if group <= USUAL_NODE:
        return Traffic(gathered, far)
    local = min(USUAL_NODE, group)
    share = (local - 1) / (group - 1)  # share of gathered data from the same node
    return Traffic(gathered * share, gathered * (1 - share))


@cache
def found(shards: int) -> Estimate:
    """Memory and operations of one device, with one model over `shards` devices."""
    plan = Spread(shards, shards, PER_DEVICE, GLOBAL_BATCH, SAMPLES // GLOBAL_BATCH, mixed=True)
    parts = TrainOnly(["vision_backbone", "projector", "llm"])
    return estimate(
        lambda **_: VLA.from_config(MODELS["openvla_7b"]), parts, TokenHead(), plan, kind="adamw_bf16", recompute="full"
    )


def row(devices: int, kind: str) -> list[str]:
    """A line of the table."""
    nodes = max(1, devices // USUAL_NODE)
    replicas = nodes if kind == "HSDP" else 1
    known = card(CARD)
    assert known is not None
    needed = found(devices // replicas)
    batches = max(1, GLOBAL_BATCH // devices // PER_DEVICE)
    sent = traffic(needed.parameters, devices, replicas, batches)
    computing = GLOBAL_BATCH / devices * needed.flops / (UTILISATION * known.tflops * 1e12)
    step = max(computing, sent.seconds)  # blocks are gathered while others are computed
    rate = GLOBAL_BATCH / step
    days = SAMPLES / rate / 86_400
    received = [f"{value / 1e9:.0f}" for value in (sent.inside, sent.between)]
    return [
        *(str(devices), kind, f"{needed.peak / 1e9:.0f}", "yes" if needed.fits(known) else "no"),
        *(*received, f"{sent.seconds:.2f}", f"{step:.2f}", f"{rate:,.0f}", f"{UTILISATION * computing / step:.0%}"),
        *(f"{days:.1f}", f"{days * 24 * devices * PRICE:,.0f}", f"{needed.checkpoint / DISK / nodes:.1f}"),
        f"{rate / nodes * PICTURE / 1e6:.0f}",
    ]


def table() -> str:
    """The whole table."""
    spread = [(1, "one"), (8, "FSDP"), (64, "FSDP"), (64, "HSDP"), (512, "FSDP"), (512, "HSDP")]
    return markdown([HEADER, *(row(devices, kind) for devices, kind in spread)])


def ranks(world: int = 512, batches: int = 8, start: int = 1_400_000_000) -> str:
    """Compute each process' part of some batches from its own order, and compare with a single process."""
    from sampler import BATCH, GROWTH, SIZES  # the benchmark beside this one

    sizes = [round(1000 * GROWTH * thousands) for thousands, _ in SIZES.values()]
    stages = [Stage(0, [size / sum(sizes) for size in sizes])]
    first = start - start % BATCH
    numbers = np.arange(first, first + batches * BATCH)
    alone = np.stack(GlobalOrder(sizes, stages, seed=7)(numbers))
    shared, seconds = np.full_like(alone, -1), []
    for rank in range(world):
        begun = time.process_time()
        order = GlobalOrder(sizes, stages, seed=7)
        parts = BatchNumbers(lambda: first, BATCH, sum(sizes), world, rank)
        for batch, mine in zip(range(batches), parts, strict=False):
            found = np.array(mine)
            shared[:, found - first] = np.stack(order(found))
            if batch == 0:
                seconds.append(time.process_time() - begun)
    same = np.array_equal(shared, alone)
    return (
        f"{world} processes, {len(sizes)} datasets, {sum(sizes):,} steps, from sample {first:,} on: {batches} batches "
        f"of {BATCH} are {'what one process is given, each sample once' if same else 'NOT what one process is given'}; "
        f"to its first batch a process takes {np.median(seconds):.3f} s of CPU, at most {max(seconds):.3f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", action="store_true", help="the order of training, shared by 512 processes")
    print(ranks() if parser.parse_args().ranks else table())
