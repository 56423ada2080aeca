"""Latency of an action, stage by stage, compared with the hardware's limit and with the released code's method.

python -m openvla_lightning.bench_latency                          # two models with random weights
python -m openvla_lightning.bench_latency --model openvla_7b       # at full size, on a GPU
python -m openvla_lightning.bench_latency --model runs/mine --quantisation none int8_weight
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from openvla_lightning.action_head import ActionHead, TokenHead
from openvla_lightning.cost.cards import CARDS, Card, card
from openvla_lightning.cost.limits import bound, stored
from openvla_lightning.model.vision_backbone import pixel_statistics
from openvla_lightning.model.vla import VLA
from openvla_lightning.plugins import USUAL_HEAD, describe
from openvla_lightning.policy import Policy, choose_device, choose_dtype
from openvla_lightning.processor import Processor
from openvla_lightning.quantisation import FastQuantisation, Quantisation, Quantiser
from openvla_lightning.report.tables import markdown

EXTREMES = ("q01", "q99", "min", "max")
STAGES = ("preprocess", "copy", "vision", "prefill", "decode", "unnormalise")
INSTRUCTION = "pick up the red cube and put it on the white plate"
FORMATS: dict[str, Callable[[], Quantiser]] = {
    "int8": lambda: Quantisation(8),
    "int4": lambda: Quantisation(4),
    **{kind: lambda kind=kind: FastQuantisation(kind) for kind in ("int8_weight", "int4_weight", "fp8")},  # type: ignore[misc]
}
_DINO, _SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224.webli"
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}


def _described(towers: dict[str, Any], size: int, projector: str, words: int, *llm: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ids = {"vocab_size": words + 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    architecture = {"model_type": "llama", **ids, **dict(zip(names, llm, strict=True))}
    return {
        "vision_backbone": {"towers": towers, "image_size": size},
        "projector": {"kind": projector},
        "llm": {"name": "tiny", "vocab_size": words, "architecture": architecture},
    }


_XCIT = {"id": "xcit_nano_12_p16_224", "embed_dim": 128, "depth": 4, "num_heads": 4}
_PAIR = {"dino": {"id": _DINO, **_SMALL}, "siglip": {"id": _SIGLIP, **_SMALL}}
MODELS = {
    "tiny": _described({"stem": _XCIT}, 96, "mlp", 768, 128, 344, 3, 4),
    "mid": _described(_PAIR, 224, "fused_mlp", 32000, 768, 2048, 12, 12),
    "openvla_7b": _described({"dino": _DINO, "siglip": _SIGLIP}, 224, "fused_mlp", 32000, 4096, 11008, 32, 32),
}
"""Models that can be measured without a checkpoint: 2 million, 0.2 billion and 7.5 billion parameters."""


@dataclass
class Row:
    """Measurements of one model, in seconds.

    Attributes:
        name: the model and the format of its weights.
        actions: time of each whole action.
        stages: times of each stage, from separate actions that wait for the device after every stage.
        memory: bytes; the GPU's peak, or on a CPU the weights.
        bound: lower limit of the hardware; None if it is not known.
        baseline: time of each action with the released method, alternating with ours; empty when not measured.
    """

    name: str
    actions: list[float]
    stages: dict[str, list[float]] = field(default_factory=dict)
    memory: int = 0
    bound: float | None = None
    baseline: list[float] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The cells of the table, in milliseconds."""
        low, high, worst = (1e3 * float(np.percentile(self.actions, share)) for share in (50, 95, 99))
        stages = [f"{1e3 * float(np.median(self.stages.get(stage) or [0.0])):.1f}" for stage in STAGES]
        bound = "" if self.bound is None else f"{1e3 * self.bound:.1f}"
        theirs = float(np.median(self.baseline)) * 1e3 if self.baseline else 0.0
        released = [f"{theirs:.1f}", f"{theirs / low:.2f}"] if self.baseline else ["", ""]
        line = [self.name, *stages, f"{low:.1f}", f"{high:.1f}", f"{worst:.1f}", f"{1e3 / low:.1f}"]
        return [*line, f"{self.memory / 1e9:.2f}", bound, *released]


HEADER = ["ms", *STAGES, "p50", "p95", "p99", "Hz", "GB", "bound", "released way", "times ours"]


def random_policy(
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    format_: Quantiser | None,
    head: ActionHead | None = None,
    cameras: Sequence[str] = ("primary",),
) -> Policy:
    """A policy with random weights, made on the device without torch's slow initialisation.

    Args:
        config: of the VLA; with a `proprio_dim` P, the policy reads a state of P numbers.
        device, dtype: of the weights.
        format_: quantiser of the weights; None: no quantisation.
        head: the action head; None: tokens, one action at a time.
        cameras: the policy's cameras.
    """
    head = head or TokenHead(vocab_size=config["llm"]["vocab_size"])
    with torch.device("meta"):
        vla = VLA.from_config({**config, "action_head": describe(head, USUAL_HEAD)})
    generator = torch.Generator(device).manual_seed(0)
    for module in vla.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.ndim > 1:
                values.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                values.fill_(1.0 if name == "weight" else 0.1)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    vla.language_model.tie_weights()
    vla.eval().to(device, dtype)  # the buffers, too
    if format_ is not None:
        format_(vla, device)
    towers = vla.vision_backbone.towers
    means, stds = pixel_statistics(towers)
    proprio = vla.proprio_dim is not None
    size = vla.vision_backbone.image_size
    processor = Processor(head, image_size=size, means=means, stds=stds, cameras=cameras, proprio=proprio)
    action = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    felt = {name: [value] * (vla.proprio_dim or 0) for name, value in zip(EXTREMES, (-1.0, 1.0) * 2, strict=True)}
    stats = {"random": {"action": action | {"min": action["q01"], "max": action["q99"]}, "proprio": felt}}
    return Policy(vla, processor, stats, device=device, dtype=dtype)


def released_way(policy: Policy) -> Callable[[np.ndarray, str], np.ndarray]:
    """Act as the released code does, with the same weights: every ViT block, then transformers' `generate`."""
    vla, processor = policy.vla, policy.processor
    head, count = processor.action_head, policy.statistics.action_dim
    if not isinstance(head, TokenHead):
        raise ValueError(f"the released code writes actions as tokens; {type(head).__name__} does not: --no-baseline")
    with torch.device("meta"):
        llm = LlamaForCausalLM(vla.llm.model.config).eval()
    llm.model, llm.lm_head = vla.llm.model, vla.llm.lm_head

    def features(pixels: Tensor) -> Tensor:
        towers: list[Any] = vla.vision_backbone.featurizers
        if not all(hasattr(tower, "get_intermediate_layers") for tower in towers):
            return vla.vision_backbone(pixels)
        halves = zip(towers, pixels.split(3, dim=1), strict=True)
        return torch.cat([tower.get_intermediate_layers(half, [len(tower.blocks) - 2])[0] for tower, half in halves], 2)

    @torch.inference_mode()
    def act(image: np.ndarray, instruction: str) -> np.ndarray:
        inputs = processor([image], [instruction])
        pixels = inputs["pixel_values"].to(policy.device, policy.dtype)
        text, visual = vla.llm.embed(inputs["input_ids"].to(policy.device)), vla.projector(features(pixels))
        embeddings = torch.cat([text[:, :1], visual.to(text.dtype), text[:, 1:]], dim=1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=policy.device)
        ids = llm.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        normalised = head.decode(ids).numpy()
        return policy.statistics.unnormalise(normalised, method=policy.normalisation)[0]

    return act


def measure(
    name: str,
    policy: Policy,
    repeats: int,
    baseline: bool,
    hardware: Card | None,
    now: Callable[[], float] = time.perf_counter,
) -> Row:
    """Time `repeats` whole actions, as many stage by stage, and as many with the released method."""
    generator = np.random.default_rng(0)
    pictures = list(generator.integers(0, 256, (repeats, 256, 256, 3), dtype=np.uint8))
    cuda = policy.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    policy.warm_up((1,), (INSTRUCTION, INSTRUCTION))
    theirs = released_way(policy) if baseline else None
    if theirs is not None:
        ours, expected = policy.act(pictures[0], INSTRUCTION), theirs(pictures[0], INSTRUCTION)
        print(
            f"{name}: the released way gives {'the same action' if np.allclose(ours, expected) else 'another action'}"
        )
    row = Row(name, [], {stage: [] for stage in STAGES})
    for picture in pictures:
        observations = [policy.standing(picture, INSTRUCTION)]
        row.actions.append(_seconds(partial(policy.act_chunk, observations), now))
        if theirs is not None:
            row.baseline.append(_seconds(partial(theirs, picture, INSTRUCTION), now))
    row.memory = torch.cuda.max_memory_allocated() if cuda else stored(policy.vla)
    last = [0.0]

    def clock(stage: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        over = now()
        row.stages.setdefault(stage, []).append(over - last[0])
        last[0] = over

    policy.clock = clock
    for picture in pictures:
        last[0] = now()
        policy.act_chunk([policy.standing(picture, INSTRUCTION)])
    if hardware is not None:
        tokens = len(policy.processor.prompt_ids(INSTRUCTION)) + policy.vla.vision_backbone.num_patches
        head = policy.processor.action_head
        if isinstance(head, TokenHead):
            row.bound = bound(policy.vla, hardware, tokens, head.action_chunk * policy.statistics.action_dim)
    return row


def _seconds(act: Callable[[], np.ndarray], now: Callable[[], float]) -> float:
    started = now()
    act()  # its result is on the CPU, so the device has finished
    return now() - started


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot each row as a bar of its stages' medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    left = np.zeros(len(rows))
    for stage in STAGES:
        widths = np.array([1e3 * float(np.median(row.stages.get(stage) or [0.0])) for row in rows])
        axes.barh([row.name for row in rows], widths, left=left, label=stage)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds an action, medians")
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Command line: measure, print the table, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny", "mid"], help=f"{', '.join(MODELS)}, or a checkpoint")
    parser.add_argument("--quantisation", nargs="+", default=["none"], choices=["none", *FORMATS])
    parser.add_argument("--unnorm-key", help="whose units, where a checkpoint knows several")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--no-baseline", action="store_true", help="leave the released code's way out")
    parser.add_argument("--cpu-time", action="store_true", help="the process' own, where others share the CPU")
    parser.add_argument("--card", help="whose limits to print, such as H200; default: the GPU in use")
    parser.add_argument("--out", type=Path, help="folder for latency.md and latency.png")
    options = parser.parse_args(arguments)
    if options.card is not None and card(options.card) is None:
        parser.error(f"--card {options.card} is not known; known: {', '.join(known.name for known in CARDS)}")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    hardware, rows = card(options.card or machine), []
    now = time.process_time if options.cpu_time else time.perf_counter
    for model in options.model:
        for quantisation in options.quantisation:
            format_ = None if quantisation == "none" else FORMATS[quantisation]()
            kept = str(dtype).removeprefix("torch.") if format_ is None else quantisation
            try:
                if format_ is not None:
                    format_.check(device, dtype)
            except ValueError as error:
                print(f"left out: {error}")
                continue
            if model in MODELS:
                policy = random_policy(MODELS[model], device, dtype, format_)
            else:
                policy = Policy.from_pretrained(model, options.unnorm_key, device, dtype, format_)
            rows.append(measure(f"{model}, {kept}", policy, options.repeats, not options.no_baseline, hardware, now))
            del policy
    text = f"{machine}, torch {torch.__version__}\n\n" + markdown([HEADER, *(row.cells() for row in rows)])
    print(text)
    if options.out is not None and rows:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "latency.md").write_text(text + "\n", encoding="utf-8")
        plot(rows, options.out / "latency.png")
    return rows


if __name__ == "__main__":
    main()
