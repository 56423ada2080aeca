"""A dress rehearsal of acting, serving and offline evaluation on a GPU, at the widths of a 7B model, without one.

Every head acts by its fast decoder and by its plain reference. What the host waits for is said here, place by place;
anything else fails. While a CUDA graph is captured the fake GPU refuses reads and copies by itself.

What cannot be rehearsed: compilation, which needs the GPU's own compiler; bitsandbytes' int8 and int4, see
`test_rehearsal.py`. torchao's formats are rehearsed where torchao is installed; whether their kernels exist for a card
is known on that card alone.
"""

import copy
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import FakeGPU, fake_gpu
from rehearsed import HEADS, MEANT, WIDE, WORDS, not_meant, observations, steps

from openvla_lightning.action_head.fast_static import LOOKED_AT
from openvla_lightning.bench_latency import FORMATS, random_policy
from openvla_lightning.evaluation.held_out import score_offline
from openvla_lightning.policy import Policy
from openvla_lightning.serve.batching import Batcher
from openvla_lightning.serve.reading import Question
from openvla_lightning.types import Step

IN_GRAPHS = {"tokens", "tokens_parallel", "fast", "l1", "diffusion"}
"""Heads whose network is captured; the others' follows the language model as it comes."""
ACTIONS = {
    "tokens": "tokens.py:decode",
    "tokens_parallel": "tokens.py:decode",
    "fast": "fast_static.py:write",
}
"""Where actions are read; those of the other heads in `policy.py`."""


def policy(head: str, quantisation: str | None = None) -> Policy:
    """With random weights, on the GPU."""
    format_ = None if quantisation is None else FORMATS[quantisation]()
    return random_policy(copy.deepcopy(WIDE), torch.device("cuda"), torch.bfloat16, format_, HEADS[head]())


def acts_without_waiting(gpu: FakeGPU, made: Policy, head: str, batch: int) -> None:
    """Act twice, on prompts of the same bucket; the second time nothing is captured, and only actions are read."""
    made.act_chunk(observations(["open the big drawer"] * batch))
    captured, replayed = len(gpu.captures), gpu.replays
    gpu.events.clear()
    assert made.act_chunk(observations(WORDS[:batch])).shape[0] == batch
    assert bool(captured) == (head in IN_GRAPHS)
    assert len(gpu.captures) == captured, "what was captured once is replayed"
    assert (gpu.replays > replayed) == bool(captured)
    reads, place = gpu.where("read"), ACTIONS.get(head, "policy.py:act_chunk")
    assert set(reads) == {place}
    looks = 0 if head != "fast" else -(-made.processor.action_head.action_chunk * 7 // LOOKED_AT)
    assert len(reads) == 1 + looks, "the actions; FAST also looks whether all chunks are whole"
    assert [text for text in not_meant(gpu) if text != f"read at {place}"] == []
    assert gpu.where("float32 product") == []


@pytest.mark.parametrize("head", HEADS)
def test_a_chunk_is_read_once_and_waited_for_nowhere_else(head: str) -> None:
    with fake_gpu() as gpu:
        acts_without_waiting(gpu, policy(head), head, 1)


@pytest.mark.parametrize("head", [name for name in HEADS if name != "insulated"])
def test_the_plain_reference_stays_on_the_device(head: str) -> None:
    with fake_gpu() as gpu:
        gpu.scalar = 0  # FAST's chunks are whole at once
        made = policy(head)
        plain = made.processor.action_head.decoder(made.vla, replace(made.acting, static=False))
        given = made.processor.inputs(observations(WORDS), 7, [None] * len(WORDS))
        gpu.events.clear()
        assert plain(given, 7, torch.Generator()).shape[::2] == (len(WORDS), 7)
        assert set(gpu.where("float64")) <= {"flow_matching.py:time_embedding"}
        assert gpu.where("float32 product") == []
        assert not gpu.captures


@pytest.mark.parametrize("quantisation", ["int8_weight", "int4_weight", "fp8"])
def test_fast_formats_act_in_graphs(quantisation: str) -> None:
    pytest.importorskip("torchao")
    with fake_gpu() as gpu:
        acts_without_waiting(gpu, policy("tokens", quantisation), "tokens", 1)


@pytest.mark.parametrize("head", ["tokens", "l1"])
def test_the_servers_batch_is_acted_on_together(head: str) -> None:
    """Robots that wait while the model works; a batch of three is one of four that was captured."""
    with fake_gpu() as gpu:
        made = policy(head)
        sizes: list[int] = []

        def act(seen: Any, keys: Any) -> np.ndarray:
            with gpu.here():
                return made.act_chunk(seen, keys)

        made.act_chunk(observations(["open the big drawer"] * 4))
        captured = len(gpu.captures)
        batcher = Batcher(act, max_batch=3, max_wait=60, on_batch=sizes.append)
        gpu.events.clear()
        until = time.monotonic() + 600
        asked = [batcher.submit(Question(seen, "random"), until) for seen in observations(WORDS)]
        answers = [answer.result(600) for answer in asked]
        batcher.join()
    assert sizes == [3]
    assert {answer.shape for answer in answers} == {(made.processor.action_head.action_chunk, 7)}
    assert len(gpu.captures) == captured
    assert len(gpu.where("read")) == 1
    assert gpu.where("copy", "pageable") == []


class Shown:
    """Recorded steps, as an environment for offline evaluation opens them."""

    def __init__(self, batches: list[list[Step]], statistics: Any) -> None:
        self.batches, self.statistics, self.num_steps = batches, statistics, len(batches[0])

    def open(self, **reads: Any) -> tuple[Iterator[list[Step]], dict[str, Any], list[str]]:
        """The steps, their statistics, names of datasets."""
        return iter(self.batches), {"random": self.statistics}, ["random"]


@pytest.mark.parametrize("head", ["tokens", "fast", "diffusion", "flow", "cogact"])
def test_offline_evaluation_reads_results_alone(head: str) -> None:
    with fake_gpu() as gpu:
        gpu.scalar = 0
        made = policy(head)
        env: Any = Shown([steps(made.processor.action_head, 2, "random")], made.statistics)
        score_offline(made, env)
        gpu.events.clear()
        found = score_offline(made, env)
    assert found["datasets"]["random"]["confusion"]["tasks"] == WORDS[:2]
    chooses = "token_accuracy" in found
    assert chooses == (head in ("tokens", "fast"))
    reads = Counter(place.replace("<dictcomp>", "_score") for place in gpu.where("read"))  # Python 3.11 and 3.12
    assert reads.pop(ACTIONS.get(head, "policy.py:act_chunk")) >= 1
    assert reads.pop("held_out.py:_score") == (3 if chooses else 1), "each metric"
    assert reads.pop("confusion.py:_error") == 4, "each task told each one's words"
    assert [place for place in reads if f"read at {place}" not in MEANT] == []
    assert gpu.where("copy", "pageable", "float32 product") == []
