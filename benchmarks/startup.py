"""CPU seconds until a command has done its first useful thing, user and system.

    python benchmarks/startup.py                        # this version
    python benchmarks/startup.py --beside CHECKOUT      # beside another version of this code, taking turns

One step is a training of the laptop's recipe that ends after it, so a checkpoint and the run's page are in it. Its
demonstrations are written and indexed before the clock starts.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from openvla_lightning.report.tables import markdown

HERE = Path(__file__).parents[1]
ONE_STEP = ["train.py", "trainer.max_steps=1", "trainer.val_check_interval=1"]
ESTIMATE = ["train.py", "+experiment=oxe_full", "estimate=true"]
COMMANDS = {
    "`import openvla_lightning.policy`": ["-c", "import openvla_lightning.policy"],
    "`import openvla_lightning.run.fit`": ["-c", "import openvla_lightning.run.fit"],
    "a wrong path: `train.py model.init_from=/nope`": ["train.py", "model.init_from=/nope"],
    "one step: `train.py trainer.max_steps=1`": ONE_STEP,
    "openvla-7b estimated: `train.py +experiment=oxe_full estimate=true`": ESTIMATE,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--repeats", type=int, default=3)
    told = parser.parse_args()
    versions = {"now": HERE} if told.beside is None else {"before": told.beside.resolve(), "now": HERE}
    rows = [["CPU seconds", *versions, *(["ratio"] if told.beside else [])]]
    with tempfile.TemporaryDirectory() as folder:
        for checkout in versions.values():
            cpu_seconds(checkout, ONE_STEP, folder)
        for name, command in COMMANDS.items():
            times: dict[str, list[float]] = {version: [] for version in versions}
            for _ in range(told.repeats):
                for version, checkout in versions.items():
                    times[version].append(cpu_seconds(checkout, command, folder))
            medians = [statistics.median(taken) for taken in times.values()]
            ratio = [f"{medians[1] / medians[0]:.2f}"] if told.beside else []
            rows.append([name, *(f"{seconds:.1f}" for seconds in medians), *ratio])
    print(markdown(rows))


def cpu_seconds(checkout: Path, command: list[str], folder: str) -> float:
    """CPU seconds of a command of this checkout, and of its processes."""
    own = {"PYTHONPATH": str(checkout), "OPENVLA_LIGHTNING_ROOT": folder, "OPENVLA_LIGHTNING_DATA": f"{folder}/data"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | own, cwd=checkout, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if (done.returncode != 0) != ("/nope" in command[-1]):
        raise SystemExit(f"error: {' '.join(command)} in {checkout} ended with {done.returncode}:\n{done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
