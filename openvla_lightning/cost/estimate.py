"""Estimates a training run before it starts: memory of a device, time on each card."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from openvla_lightning.action_head import ActionHead
from openvla_lightning.cost.cards import CARDS, Card, card
from openvla_lightning.cost.operations import example, step_cost
from openvla_lightning.model import VLA
from openvla_lightning.model.blocks import Recompute, blocks, recompute_activations
from openvla_lightning.model.parameters import count, floating
from openvla_lightning.optim import STATE_BYTES
from openvla_lightning.quantisation import Quantisation, quantised_names
from openvla_lightning.report.tables import Rows, table
from openvla_lightning.strategy import Strategy

PROMPT_TOKENS = 26
"""Ids of BOS and a prompt of typical length."""
ACTION_DIM = 7
"""Action dimensions, and numbers of the state, of an arm with a gripper, for heads that take any number."""
UTILISATION = 0.4
"""Expected share of a card's peak speed, recomputed operations included."""
RESERVE = 1.05
"""Factor for allocator fragmentation; the CUDA context needs `CONTEXT` more bytes."""
CONTEXT = 1e9
USUAL_NODE = 8
"""GPUs per machine, if a config asks for all of them and this machine has none."""
LESS_MEMORY = (
    "checkpoint_activations=full",
    "batch_size_per_device=1",
    "optim.kind=adamw_8bit or adamw_bf16",
    "trainer=fsdp on more devices",
    "strategy=lora, or qlora",
)


@dataclass(frozen=True, slots=True)
class Spread:
    """How a run is spread over devices.

    Attributes:
        devices: number of devices.
        shards: number of devices over which one copy of the model is sharded; 1: each has a whole copy.
        batch: samples on one device at a time.
        global_batch: samples of an optimiser step.
        max_steps: steps of the run; -1: until it is stopped.
        mixed: compute in bfloat16 with weights of another dtype.
    """

    devices: int
    shards: int
    batch: int
    global_batch: int
    max_steps: int
    mixed: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of one device, and the size of the whole run.

    Attributes:
        parameters, trainable: of the model.
        memory: use -> bytes of one device.
        checkpoint: bytes of a checkpoint.
        flops: operations of one sample, recomputed ones included.
        plan: the estimated plan.
    """

    parameters: int
    trainable: int
    memory: dict[str, float]
    checkpoint: float
    flops: float
    plan: Spread

    @property
    def peak(self) -> float:
        """Memory in bytes that one device needs."""
        return sum(self.memory.values()) * RESERVE + CONTEXT

    def fits(self, card: Card) -> bool:
        """Whether `card` has enough memory."""
        return self.peak <= card.memory_gb * 1e9

    def samples_per_second(self, card: Card) -> float:
        """Samples per second of all devices together, with this card."""
        return UTILISATION * card.tflops * 1e12 * self.plan.devices / self.flops


def estimate(
    model: Callable[..., VLA],
    strategy: Strategy,
    head: ActionHead,
    plan: Spread,
    kind: str = "adamw",
    dtype: str | None = None,
    quantisation: Quantisation | None = None,
    recompute: Recompute = "none",
    views: int = 1,
) -> Estimate:
    """Build a model without memory and estimate a training run of it.

    Args:
        model: builds the VLA, given `action_head`; called on the meta device, twice if it computes in another dtype.
        strategy: which weights learn.
        head: the action head.
        plan: distribution over devices.
        kind: kind of AdamW.
        dtype: dtype of the loaded weights.
        quantisation: quantisation of frozen weights.
        recompute: which blocks recompute their activations.
        views: V, pictures of a sample.
    """

    made: dict[str | None, tuple[VLA, set[nn.Parameter]]] = {}

    def learner(dtype: str | None) -> tuple[VLA, set[nn.Parameter]]:
        if dtype in made:
            return made[dtype]
        with torch.device("meta"):
            vla = model(action_head=head)
            if dtype is not None:
                vla.to(floating(dtype))
            names = quantised_names(vla, quantisation.keep) if quantisation is not None else []
            packed: Any = {vla.get_submodule(name).weight for name in names}
            strategy.apply(vla)
        made[dtype] = vla, packed
        return made[dtype]

    vla, packed = learner(dtype)
    weights = sum(_bytes(p, p in packed, quantisation) for p in vla.parameters())
    learning = [p for p in vla.parameters() if p.requires_grad]
    gradients = float(sum(p.numel() * p.element_size() for p in learning))
    moments = sum(p.numel() * (2 * p.element_size() if kind == "adamw" else STATE_BYTES[kind]) for p in learning)
    parameters, trainable = count(vla)
    block = max(sum(p.numel() for p in block.parameters()) for block in blocks(vla))
    rest = parameters - sum(p.numel() for block in blocks(vla) for p in block.parameters())

    batch = example(vla, head, PROMPT_TOKENS, getattr(head, "action_dim", ACTION_DIM), views)
    once = 0.0
    if recompute != "none":  # a block has all its activations while it is recomputed
        whole = step_cost(learner("bfloat16")[0], head, batch, autocast=plan.mixed)
        once = whole.activations / len(blocks(vla))
    sharded = plan.shards > 1
    if sharded and plan.mixed:  # FSDP gathers bfloat16 copies, block by block
        vla, _ = learner("bfloat16")
    recompute_activations(vla, recompute)
    cost = step_cost(vla, head, batch, autocast=plan.mixed)
    memory = {
        "weights": weights / plan.shards,
        "gradients": gradients / plan.shards,
        f"optimiser ({kind})": moments / plan.shards,
        "weights to compute with": 2.0 * (rest + 2 * block) if sharded else cost.casts,
        "activations": (cost.activations + once) * plan.batch,
    }
    stored = gradients if strategy.adapts else float(sum(p.numel() * p.element_size() for p in vla.parameters()))
    return Estimate(parameters, trainable, memory, stored + moments, cost.forward + cost.backward, plan)


def _bytes(parameter: nn.Parameter, packed: bool, quantisation: Quantisation | None) -> float:
    if not packed or quantisation is None:
        return parameter.numel() * parameter.element_size()
    scale = 1 / 64 if quantisation.double else 4 / 64  # bytes per number: a block of 64 numbers shares a scale
    return parameter.numel() * (1.0 if quantisation.bits == 8 else 0.5 + scale)


def needs(estimated: Estimate) -> Rows:
    """Memory that one device needs, as a table."""
    gb = [[name, f"{size / 1e9:.1f}"] for name, size in estimated.memory.items()]
    return [
        ["one device", "GB"],
        *gb,
        ["shuffle buffer (the order is computed)", "0.0"],
        ["at the peak, with context and reserve", f"{estimated.peak / 1e9:.1f}"],
        ["a checkpoint, on disk", f"{estimated.checkpoint / 1e9:.1f}"],
    ]


def durations(estimated: Estimate) -> Rows:
    """Speed and duration on each card, as a table."""
    rows = [["card", "GB", "fits", "samples/s", "days", "GPU-hours"]]
    for known in CARDS:
        rate = estimated.samples_per_second(known)
        days = estimated.plan.max_steps * estimated.plan.global_batch / rate / 86_400
        ends = (
            [f"{days:.1f}", f"{days * 24 * estimated.plan.devices:,.0f}"] if estimated.plan.max_steps > 0 else ["", ""]
        )
        rows.append(
            [known.name, f"{known.memory_gb:.0f}", "yes" if estimated.fits(known) else "no", f"{rate:,.0f}", *ends]
        )
    return rows


def plan(recipe: Mapping[str, Any]) -> Spread:
    """The distribution over devices in a resolved configuration."""
    trainer, data = recipe["trainer"], recipe["data"]
    per_node = trainer.get("devices", 1)
    if isinstance(per_node, list):
        per_node = len(per_node)
    nodes = trainer.get("num_nodes", 1)
    devices = nodes * (int(per_node) if str(per_node).isdigit() else torch.cuda.device_count() or USUAL_NODE)
    engine = trainer.get("strategy")
    sharded = isinstance(engine, Mapping) and str(engine["_target_"]).endswith(".FSDP")
    whole = data["global_batch_size"]
    share = whole // devices // trainer.get("accumulate_grad_batches", 1)
    return Spread(
        devices=devices,
        shards=devices // engine.get("replicas", 1) if sharded else 1,
        batch=recipe.get("batch_size_per_device") or max(1, share),
        global_batch=whole,
        max_steps=trainer["max_steps"],
        mixed=engine["param_dtype"] == "bfloat16" if sharded else "mixed" in str(trainer.get("precision")),
    )


def show(
    model: Callable[..., VLA],
    strategy: Strategy,
    head: ActionHead,
    quantisation: Quantisation | None,
    recipe: Mapping[str, Any],
    console: Console,
) -> Estimate:
    """Print the needs of `recipe`; warn if this machine's card, or every known card, has too little memory."""
    data = recipe["data"]
    if data.get("proprio"):
        model = partial(model, proprio_dim=getattr(head, "proprio_dim", 0) or ACTION_DIM)
    estimated = estimate(
        model,
        strategy,
        head,
        plan(recipe),
        kind=recipe["optim"].get("kind", "adamw"),
        dtype=recipe["model"].get("dtype"),
        quantisation=quantisation,
        recompute=recipe["checkpoint_activations"],
        views=len(data.get("cameras", ["primary"])) * data.get("history", 1),
    )
    spread = estimated.plan
    console.print(
        f"{estimated.parameters:,} parameters, {estimated.trainable:,} learn. {spread.devices} device(s), "
        f"{spread.batch} samples at a time on each, {spread.global_batch} in a step, {spread.max_steps:,} steps; "
        f"{estimated.flops / 1e12:.1f} TFLOPs a sample."
    )
    console.print(table(needs(estimated), "Memory"))
    console.print(table(durations(estimated), f"Time, at {UTILISATION:.0%} of each card's peak"))
    here = card(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if not any(estimated.fits(known) for known in ([here] if here else CARDS)):
        console.print(
            f"This will not fit on {here.name if here else 'any of these'}. Less memory: {', '.join(LESS_MEMORY)}.",
            style="bold red",
        )
    return estimated
