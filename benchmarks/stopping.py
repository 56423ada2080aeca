"""Simulation of early stopping: its false alarms, and the scenes that it saves.

    python benchmarks/stopping.py --comparisons 2000

Each row simulates comparisons of two policies with known success rates on the same scenes, with tasks in random order,
and compares the stopping rule with one McNemar test at the full number of scenes.
"""

import argparse

from openvla_lightning.report.sequential import simulate

CASES = (
    ("equal, 50 %", [0.5], [0.5], 0.0),
    ("equal, 90 %", [0.9], [0.9], 0.0),
    ("equal, partial credit", [0.5], [0.5], 0.5),
    ("equal on average, tasks differ", [0.9, 0.1], [0.1, 0.9], 0.0),
    ("50 % and 60 %", [0.5], [0.6], 0.0),
    ("50 % and 70 %", [0.5], [0.7], 0.0),
    ("50 % and 80 %", [0.5], [0.8], 0.0),
    ("50 % and 95 %", [0.5], [0.95], 0.0),
    ("80 % and 90 %", [0.8], [0.9], 0.0),
    ("90 % and 97 %", [0.9], [0.97], 0.0),
    ("50 % and 70 %, partial credit", [0.5], [0.7], 0.5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=500, help="scenes at most, and those of the fixed test")
    options = parser.parse_args()
    print("| policies | decided | wrongly | scenes on average | saved | one test at the end finds it |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, first, second, partial in CASES:
        found = simulate(first, second, options.comparisons, options.pairs, partial)
        saved = 1 - found.mean_pairs / options.pairs
        print(
            f"| {name} | {found.decided:.1%} | {found.wrong:.1%} | {found.mean_pairs:.0f} of {options.pairs} "
            f"| {saved:.0%} | {found.fixed:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
