"""Comparison of our training step with the released one, in one run.

    python benchmarks/train.py                     # a small model on the CPU: seconds per step, ratio
    python benchmarks/train.py gpu --learn lora    # openvla-7b with random weights on one GPU, 16 samples a step
    python benchmarks/train.py gpu --learn full --batch 32

The released step is reimplemented: both towers run all blocks and are read at the second-to-last one, there are float
logits for every position, labels are shifted over the whole sequence, and in every step the accuracy is computed from
the argmax of all logits and fetched from the device. Both steps have the same weights and the same batches.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openvla_lightning.action_head import TokenHead
from openvla_lightning.cost.cards import card
from openvla_lightning.cost.operations import example, step_cost
from openvla_lightning.model import VLA
from openvla_lightning.model.blocks import compile_blocks, recompute_activations
from openvla_lightning.optim import AdamW
from openvla_lightning.quantisation import Quantisation
from openvla_lightning.strategy import LoRA, TrainOnly

SMALL = {
    "vision_backbone": {
        "towers": {
            "dino": {"id": "vit_large_patch14_reg4_dinov2.lvd142m", "embed_dim": 192, "depth": 6, "num_heads": 3},
            "siglip": {"id": "vit_so400m_patch14_siglip_224.webli", "embed_dim": 192, "depth": 6, "num_heads": 3},
        },
        "image_size": 224,
    },
    "projector": {"kind": "fused_mlp"},
    "llm": {
        "name": "small",
        "vocab_size": 32000,
        "architecture": {
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
        },
    },
}
LARGE = {
    "vision_backbone": {
        "towers": {"dino": "vit_large_patch14_reg4_dinov2.lvd142m", "siglip": "vit_so400m_patch14_siglip_224.webli"},
        "image_size": 224,
    },
    "projector": {"kind": "fused_mlp"},
    "llm": {
        "name": "llama2",
        "vocab_size": 32000,
        "architecture": {
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    },
}
TEXT, LEARNT = 34, 8
"""Ids in a row, and the number that is learnt: 7 of the action and the end token."""


def batch(size: int, device: str) -> dict[str, Tensor]:
    """Random uint8 pictures and ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 31000, (size, TEXT), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -LEARNT:] = ids[:, -LEARNT:]
    pixels = torch.randint(0, 256, (size, 3, 224, 224), generator=generator, dtype=torch.uint8)
    places = torch.arange(TEXT - 1 - LEARNT, TEXT - 1).expand(size, -1)
    made = {"pixels": pixels, "ids": ids, "labels": labels, "places": places}
    return {name: tensor.to(device) for name, tensor in made.items()}


def normalised(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1).repeat(1, 2, 1, 1)


def ours(vla: VLA, given: dict[str, Tensor]) -> Tensor:
    """The loss, as training computes it; accuracy stays on the device."""
    output = vla(pixel_values=normalised(given["pixels"]), input_ids=given["ids"], places=given["places"])
    targets = output.targets(given["labels"])
    _ = (output.next_token_logits.argmax(-1) == targets).sum()
    return torch.nn.functional.cross_entropy(output.next_token_logits.flatten(0, 1), targets.flatten())


def released(vla: VLA, given: dict[str, Tensor]) -> Tensor:
    """The loss, as the released code computes it."""
    pixels = normalised(given["pixels"]).split(3, dim=1)
    features = [
        tower.get_intermediate_layers(image, n={len(tower.blocks) - 2})[0]
        for tower, image in zip(vla.vision_backbone.featurizers, pixels, strict=True)
    ]
    visual = vla.projector(torch.cat(features, dim=2))
    text = vla.llm.embed(given["ids"])
    embeddings = torch.cat([text[:, :1], visual.to(text.dtype), text[:, 1:]], dim=1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    logits = vla.llm.logits(vla.llm.decode(embeddings, attention_mask=mask))
    nothing = given["labels"].new_full(visual.shape[:2], -100)
    labels = torch.cat([given["labels"][:, :1], nothing, given["labels"][:, 1:]], dim=1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    predicted, truth = logits[:, visual.shape[1] : -1].argmax(-1), given["labels"][:, 1:]
    of_actions = truth > 31743
    _ = ((predicted == truth) & of_actions).sum().float().div(of_actions.sum()).item()
    return loss


Loss = Callable[[VLA, dict[str, Tensor]], Tensor]


def take_step(loss: Loss, vla: VLA, optimizer: torch.optim.Optimizer, given: dict[str, Tensor]) -> Tensor:
    with torch.autocast(given["ids"].device.type, torch.bfloat16, enabled=given["ids"].is_cuda):
        value = loss(vla, given)
    value.backward()
    torch.nn.utils.clip_grad_norm_([p for p in vla.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()


def prepare(vla: VLA, learn: str) -> None:
    """Choose which weights learn: `full`, `lora`, or `qlora` (adapters on a 4-bit base)."""
    if learn == "qlora":
        Quantisation(4)(vla, next(vla.parameters()).device)
    (TrainOnly(["vision_backbone", "projector", "llm"]) if learn == "full" else LoRA(32)).apply(vla)
    vla.train()


def on_cpu(learn: str, size: int, rounds: int) -> None:
    """Print medians of alternating steps of both kinds."""
    torch.manual_seed(0)
    model = VLA.from_config(SMALL)
    prepare(model, learn)
    given = batch(size, "cpu")
    with torch.no_grad():
        difference = (ours(model, given) - released(model, given)).abs().item()
    optimizer = AdamW(lr=1e-5).build(model.parameters(), rounds)[0][0]
    seconds: dict[Any, list[float]] = {ours: [], released: []}
    for _ in range(rounds + 1):
        for loss, taken in seconds.items():
            started = time.perf_counter()
            take_step(loss, model, optimizer, given)
            taken.append(time.perf_counter() - started)
    new, old = (statistics.median(seconds[loss][1:]) for loss in (ours, released))
    size_m = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size_m:.0f} M parameters, {learn}, {size} samples a step, float32, {torch.get_num_threads()} threads")
    print(f"losses differ by {difference:.1e}")
    print(f"released step {old:.3f} s, ours {new:.3f} s: {old / new:.2f} times as fast")


@dataclass(frozen=True)
class Measured:
    """Steps of one kind on one device.

    Attributes:
        rate: samples per second.
        mfu: share of the card's peak; None for an unknown card.
        peak: bytes; 0 on a CPU.
        loss: of the last step.
    """

    rate: float
    mfu: float | None
    peak: int
    loss: float

    def __str__(self) -> str:
        mfu = "peak unknown" if self.mfu is None else f"{self.mfu:.1%} MFU"
        return f"{self.rate:.1f} samples/s, {mfu}, peak {self.peak / 1e9:.1f} GB"


def operations(config: dict[str, Any], learn: str) -> float:
    """Operations of one sample, forward and backward, without recomputation."""
    with torch.device("meta"):
        twin = VLA.from_config(config)
    prepare(twin, "lora" if learn == "qlora" else learn)
    head = TokenHead(vocab_size=config["llm"]["vocab_size"])
    cost = step_cost(twin, head, example(twin, head, TEXT - LEARNT, LEARNT - 1), autocast=True)
    return cost.forward + cost.backward


def timed(
    loss: Loss,
    learn: str,
    size: int,
    rounds: int,
    recompute: Any = "none",
    config: dict[str, Any] = LARGE,
    device: str = "cuda",
    profile: bool = False,
) -> Measured:
    """Time steps of `ours` (compiled on a GPU) or of the `released` code, on a whole model with random weights."""
    gpu = device == "cuda"
    with torch.device("meta"):
        model = VLA.from_config(config)
    model.to(torch.float32 if learn == "full" or not gpu else torch.bfloat16)
    move_with_random_weights(model, device)
    prepare(model, learn)
    if loss is ours and gpu and learn != "qlora":
        compile_blocks(model)
    recompute_activations(model, recompute)
    kind = "adamw_bf16" if learn == "full" else "adamw"
    optimizer = AdamW(lr=1e-5, kind=kind).build(model.parameters(), rounds, fused=gpu)[0][0]
    given = batch(size, device)
    for _ in range(3 if gpu else 1):
        value = take_step(loss, model, optimizer, given)
    wait = torch.cuda.synchronize if gpu else lambda: None
    if gpu:
        wait()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(rounds):
        value = take_step(loss, model, optimizer, given)
    wait()
    rate = rounds * size / (time.perf_counter() - started)
    known = card(torch.cuda.get_device_name()) if gpu else None
    mfu = None if known is None else rate * operations(config, learn) / (known.tflops * 1e12)
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as taken:
            take_step(loss, model, optimizer, given)
        print(taken.key_averages().table(sort_by="self_cuda_time_total", row_limit=15, max_name_column_width=60))
    return Measured(rate, mfu, torch.cuda.max_memory_allocated() if gpu else 0, float(value))


def on_gpu(learn: str, size: int, rounds: int, recompute: Any) -> None:
    """Measure our compiled step, then the released step, on the whole model with random weights."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {learn}, {size} samples a step")
    for name, loss in (("ours", ours), ("released", released)):
        print(f"{name}: {timed(loss, learn, size, rounds, recompute, profile=loss is ours)}", flush=True)
        torch.cuda.empty_cache()


def move_with_random_weights(model: VLA, device: str) -> None:
    """Move a model from the meta device and give it random weights; buffers have their values already."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty_like(parameter, device=device).normal_(0, 0.02)
            setattr(module, name, torch.nn.Parameter(value))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--learn", default="full", choices=["full", "lora", "qlora"])
    parser.add_argument("--batch", type=int, help="samples a step (4 on a CPU, 16 on a GPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    options = parser.parse_args()
    if options.device == "cpu":
        on_cpu(options.learn, options.batch or 4, options.rounds)
    else:
        on_gpu(options.learn, options.batch or 16, options.rounds, options.recompute)
