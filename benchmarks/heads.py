"""Time per decision of each policy of a sweep, for one robot, with alternating policies.

    python benchmarks/heads.py runs/heads

All get the same pictures and instructions, on one CPU thread in float32, or on `--device cuda` in bfloat16.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from openvla_lightning.checkpoint.load import describe
from openvla_lightning.policy import Policy
from openvla_lightning.report.sweeps import find_runs
from openvla_lightning.report.tables import markdown

WORDS = "push the red cube to the left"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    policies = {}
    for run in find_runs(options.sweep):
        key = next(iter(describe(str(run)).norm_stats))
        policies[_name(run)] = Policy.from_pretrained(run, device=options.device, dtype=dtype, unnorm_key=key)
    pictures = np.random.default_rng(0).integers(0, 256, (options.repeats + 2, 96, 96, 3), dtype=np.uint8)
    times: dict[str, list[float]] = {name: [] for name in policies}
    for picture in pictures:
        for name, policy in policies.items():
            seen = policy.standing(picture, WORDS)
            started = time.perf_counter()
            policy.act_chunk([seen])
            times[name].append(time.perf_counter() - started)
    rows = [["run", "ms a decision", "actions of it", "actions a second"]]
    for name, policy in policies.items():
        seconds, chunk = float(np.median(times[name][2:])), policy.processor.action_head.action_chunk
        rows.append([name, f"{1e3 * seconds:.1f}", str(chunk), f"{chunk / seconds:.1f}"])
    print(markdown(rows))


def _name(run: Path) -> str:
    """Name of a run: its varied settings; for a sweep's first seed, only the head."""
    overrides = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    return " ".join(text for text in overrides if text.startswith(("action_head=", "seed="))) or run.name


if __name__ == "__main__":
    main()
