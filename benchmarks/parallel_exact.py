"""Parallel-exact decoding against step-by-step decoding, on the recorded steps of a mixture: same ids, fewer passes.

    python benchmarks/parallel_exact.py runs/train --steps 1000              # passes and times, one robot
    python benchmarks/parallel_exact.py runs/train --steps 10000 --robots 16 # the same ids, sooner

Steps come trajectory by trajectory, so each action is guessed from the previous one, as on a robot. Passes count runs
of the language model, including the prompt's; a batch of robots takes as many passes as its worst guess.
"""

import argparse
import time
from collections import Counter

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from openvla_lightning.config import CONF
from openvla_lightning.data.steps import StepBatches
from openvla_lightning.model.jacobi_decoding import JacobiDecoder
from openvla_lightning.model.static_decoding import StaticDecoder
from openvla_lightning.policy import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--robots", type=int, default=1, help="in one batch; each takes trajectories of its own")
    parser.add_argument(
        "--split", choices=["val", "train"], default="val", help="held-out trajectories, or learnt ones"
    )
    parser.add_argument("overrides", nargs="*", help="of the data that train.py reads")
    options = parser.parse_intermixed_args()  # overrides may follow options
    torch.set_num_threads(1)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["paths.output_dir=/tmp/unused", *options.overrides])
    data = instantiate(cfg.data, collate=list, _convert_="all")
    data.prepare_data()
    data.setup()
    ((name, steps),) = getattr(data, options.split).items()
    policy = Policy.from_pretrained(options.checkpoint, device="cpu", dtype="float32", unnorm_key=name)
    head, dim = policy.processor.action_head, steps.statistics.action_dim
    count = head.action_chunk * dim
    normalise = policy.processor.transform.normalise
    greedy = StaticDecoder(policy.vla, normalise)
    parallel = JacobiDecoder(policy.vla, normalise, first=head.tokenizer.first_id + head.tokenizer.num_bins // 2)
    different, took, seconds = 0, Counter[int](), {"stepwise": 0.0, "parallel_exact": 0.0}
    each = min(options.steps, len(steps)) // options.robots
    total = each * options.robots
    pictures = {"image_size": data.image_size, "cameras": data.cameras, "history": data.history}
    recorded = StepBatches({name: steps}, lambda asked: (np.zeros(len(asked), int), asked), **pictures)
    for position in range(each):
        seen = recorded[[robot * each + position for robot in range(options.robots)]]
        inputs = policy.processor.inputs([step.observation for step in seen], dim, [step.proprio for step in seen])
        started = time.perf_counter()
        expected = greedy(inputs, count)
        between = time.perf_counter()
        before = parallel.passes
        found = parallel(inputs, count)
        ended = time.perf_counter()
        seconds["stepwise"] += between - started
        seconds["parallel_exact"] += ended - between
        took[parallel.passes - before] += 1
        different += int((expected != found).any(dim=1).sum())
        if (done := (position + 1) * options.robots) % 500 < options.robots:
            print(f"{done} of {total}: {different} differ, {parallel.passes / parallel.actions:.2f} passes", flush=True)
    who = "one robot" if options.robots == 1 else f"{options.robots} robots in a batch"
    print(f"{total} steps of {name} ({options.split}), {who}, {count} ids each; {different} differ")
    print(f"passes an action: mean {parallel.passes / parallel.actions:.2f} of {count}; {dict(sorted(took.items()))}")
    print(", ".join(f"{way} {1e3 * spent / each:.1f} ms" for way, spent in seconds.items()))


if __name__ == "__main__":
    main()
