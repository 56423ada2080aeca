"""Latency of a chunk of actions: OpenVLA-OFT's heads in our code, and a plain version of the released method.

python benchmarks/chunk.py                                  # two models of random weights, on the CPU
python benchmarks/chunk.py --model openvla_7b --device cuda # at full size, with 16 chunks at a time
python benchmarks/chunk.py --model mid --alone              # L1 against the released way and no more: less memory

The released method runs all blocks of the towers, computes logits over the vocabulary at every position of the sequence
and keeps all layers' hidden states; embeddings at its action places are multiplied by zero. Both methods have the same
weights, alternate, and must agree. For comparison, one action is also decoded as tokens, as in OpenVLA.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from openvla_lightning.action_head import DiffusionHead, L1Head, TokenHead
from openvla_lightning.bench_latency import MODELS, random_policy
from openvla_lightning.policy import Policy
from openvla_lightning.report.tables import markdown
from openvla_lightning.types import Observation

INSTRUCTION = "pick up the red cube and put it on the white plate"
CAMERAS = ("primary", "wrist")
CHUNK, DIM, STATE = 8, 7, 8


def released_way(policy: Policy) -> Callable[[Observation], np.ndarray]:
    """A function that computes an L1 head's chunk as the released `predict_action` does."""
    vla, processor = policy.vla, policy.processor
    head: Any = processor.action_head
    with torch.device("meta"):
        llm = LlamaForCausalLM(vla.llm.model.config).eval()
    llm.model, llm.lm_head = vla.llm.model, vla.llm.lm_head

    def features(pixels: Tensor) -> Tensor:
        """Features of each view separately, through all blocks."""
        towers: list[Any] = vla.vision_backbone.featurizers
        views = []
        for view in pixels.split(3 * len(towers), dim=1):
            if not all(hasattr(tower, "get_intermediate_layers") for tower in towers):
                views.append(vla.vision_backbone(view))
                continue
            halves = zip(towers, view.split(3, dim=1), strict=True)
            found = [tower.get_intermediate_layers(half, [len(tower.blocks) - 2])[0] for tower, half in halves]
            views.append(torch.cat(found, dim=2))
        return torch.cat(views, dim=1)

    @torch.inference_mode()
    def act(seen: Observation) -> np.ndarray:
        state = policy.statistics.normalise(seen.proprio, policy.normalisation, "proprio")
        given = processor.normalise(processor.inputs([seen], DIM, [state]).to(policy.device), policy.dtype)
        text = vla.llm.embed(given.input_ids)
        written = torch.zeros_like(given.input_ids).scatter(1, given.places[:, : head.places] + 1, 1).bool()
        text = text * ~written[..., None]
        told = vla.proprio_projector(given.proprio.to(policy.dtype))[:, None]
        visual = torch.cat([vla.projector(features(given.pixel_values)), told], dim=1)
        embeddings = torch.cat([text[:, :1], visual.to(text.dtype), text[:, 1:]], dim=1)
        width = embeddings.shape[1]
        nothing_hidden = torch.zeros(1, 1, width, width, dtype=embeddings.dtype, device=embeddings.device)
        llm.model.config._attn_implementation = "sdpa"
        out = llm(
            inputs_embeds=embeddings,
            attention_mask=nothing_hidden,
            output_hidden_states=True,
            use_cache=False,
            is_causal=False,
        )
        out.logits.float()
        first = visual.shape[1] + int(given.places[0, 0])
        hidden = out.hidden_states[-1][:, first : first + head.places]
        chunk = vla.action_head(hidden).float().cpu().numpy()[0]
        return policy.statistics.unnormalise(chunk, method=policy.normalisation)

    return act


def clocked(ways: Sequence[Callable[[], Any]], repeats: int, cuda: bool) -> list[float]:
    """Median seconds of each function, called alternately."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, taken in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    return [float(np.median(taken)) for taken in times]


Way = tuple[str, float, int]
"""Description, median seconds, and number of actions."""


def measure(
    name: str, device: torch.device, dtype: torch.dtype, repeats: int, denoising: int, alone: bool = False
) -> list[Way]:
    """All methods, the released one first, one token action last; with `alone` only the released one and L1."""
    config = {**MODELS[name], "proprio_dim": STATE}
    words = config["llm"]["vocab_size"]
    l1 = random_policy(config, device, dtype, None, L1Head(CHUNK, DIM), CAMERAS)
    side = l1.processor.transform.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    seen = Observation(dict(zip(CAMERAS, pictures, strict=True)), INSTRUCTION, np.zeros(STATE, np.float32))
    theirs = released_way(l1)
    ours, expected = l1.act_chunk([seen])[0], theirs(seen)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert np.abs(ours - expected).max() < tolerance, "the two ways disagree"
    cuda = device.type == "cuda"
    if alone:
        released, fast = clocked([lambda: theirs(seen), lambda: l1.act_chunk([seen])], repeats, cuda)
        return [("L1, the released way", released, CHUNK), ("L1", fast, CHUNK)]
    parallel = random_policy(config, device, dtype, None, TokenHead(256, words, CHUNK, parallel=True), CAMERAS)
    diffusion = random_policy(config, device, dtype, None, DiffusionHead(CHUNK, DIM, steps=denoising), CAMERAS)
    tokens = random_policy(MODELS[name], device, dtype, None)
    for policy in (parallel, diffusion):
        policy.act_chunk([seen])
    tokens.act(pictures[0], INSTRUCTION)
    ways: list[Callable[[], Any]] = [
        lambda: theirs(seen),
        lambda: l1.act_chunk([seen]),
        lambda: parallel.act_chunk([seen]),
        lambda: tokens.act(pictures[0], INSTRUCTION),
    ]
    released, fast, at_once, one = clocked(ways, repeats, cuda)
    (denoised,) = clocked([lambda: diffusion.act_chunk([seen])], max(1, repeats // 5), cuda)
    many = [seen] * 16
    l1.act_chunk(many)
    (batch,) = clocked([lambda: l1.act_chunk(many)], max(1, repeats // 5), cuda)
    return [
        ("L1, the released way", released, CHUNK),
        ("L1", fast, CHUNK),
        ("L1, 16 chunks at a time", batch, 16 * CHUNK),
        ("tokens in parallel", at_once, CHUNK),
        (f"diffusion, {denoising} steps", denoised, CHUNK),
        ("tokens one after the other, one camera", one, 1),
    ]


def table(name: str, ways: list[Way]) -> list[list[str]]:
    """Rows of the table; the ratio to one token action is empty if that was not measured."""
    (_, released, _), (_, per_action, actions) = ways[0], ways[-1]
    return [
        [
            name,
            what,
            f"{1e3 * seconds:.1f}",
            f"{count / seconds:.1f}",
            f"{per_action * count / seconds:.1f}" if actions == 1 else "",
            f"{released / seconds:.2f}" if what == "L1" else "",
        ]
        for what, seconds, count in ways
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("python benchmarks/chunk.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny", "mid"], choices=MODELS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--denoising", type=int, default=10)
    parser.add_argument("--alone", action="store_true", help="L1 and the released way only")
    told = parser.parse_args()
    device = torch.device(told.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(1)
    measured = {name: measure(name, device, dtype, told.repeats, told.denoising, told.alone) for name in told.model}
    rows = [row for name, ways in measured.items() for row in table(name, ways)]
    header = ["model", "way", "ms", "actions a second", "times one token action", "times the released way"]
    print(markdown([header, *rows]))


if __name__ == "__main__":
    main()
