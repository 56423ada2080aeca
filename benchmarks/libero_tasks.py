"""Reset, render and step every task of LIBERO's five suites, and draw them on one sheet.

    python benchmarks/libero_tasks.py build/libero_tasks.npz              # 130 tasks, about 20 minutes on one core
    python benchmarks/libero_tasks.py build/libero_tasks.npz --sheet docs/libero_tasks.png

The first command resumes an interrupted run, and prints a table of seconds, and of the largest speed of any object at
the policy's first picture.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from openvla_lightning.env.libero import STEP_LIMITS, Libero

STEPS = 20
"""Number of actions: half of them no-ops, half random."""
COLUMNS, GAP, COLOURS = 10, 2, 256


def look(suites: Sequence[str], file: Path) -> dict[str, np.ndarray]:
    """The picture, the times and the speed of every task; they are saved to `file` meanwhile."""
    seen = dict(np.load(file)) if file.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for suite in suites:
        env = Libero(suite)
        for number, task in enumerate(env.tasks):
            name = f"{suite}/{number}"
            if name in seen:
                continue
            started = time.perf_counter()
            observation, _ = env.reset(seed=0, options={"task": task})
            reset, fastest = time.perf_counter() - started, env.fastest
            random, started = np.random.default_rng(number), time.perf_counter()
            for step in range(STEPS):
                action = np.zeros(7) if step % 2 else np.clip(random.normal(size=7) / 2, -1, 1)
                after, *_ = env.step(action)
            if after["image"].std() < 10 or (after["image"] == observation["image"]).all():
                raise RuntimeError(f"{suite}, {task}: the picture is empty, or did not change")
            per_step = (time.perf_counter() - started) / STEPS
            seen[name], seen[f"{name}/figures"] = observation["image"], np.array([reset, per_step, fastest])
            np.savez_compressed(file, **seen)
            print(f"{name:20} {reset:6.1f} s  {per_step:6.3f} s a step  {fastest:6.3f} m/s  {task}", flush=True)
        env.close()
    return seen


def table(suites: Sequence[str], seen: dict[str, np.ndarray]) -> str:
    """A row per suite."""
    rows = [
        "| suite | tasks | build and reset, median / longest | steps a second | fastest thing |",
        "|---|---:|---:|---:|---:|",
    ]
    for suite in suites:
        figures = np.array([seen[name] for name in seen if name.startswith(f"{suite}/") and name.endswith("figures")])
        resets, steps, fastest = figures.T
        rows.append(
            f"| {suite} | {len(figures)} | {median(resets):.1f} / {max(resets):.1f} s | {1 / median(steps):.1f} "
            f"| {max(fastest):.3f} m/s |"
        )
    return "\n".join(rows)


def sheet(suites: Sequence[str], seen: dict[str, np.ndarray], size: int) -> Image.Image:
    """All first pictures, row by row."""
    pictures = [
        seen[name] for suite in suites for name in seen if name.startswith(f"{suite}/") and "figures" not in name
    ]
    rows = -(-len(pictures) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * (size + GAP), rows * (size + GAP)), "white")
    for index, picture in enumerate(pictures):
        small = Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS)
        whole.paste(small, (index % COLUMNS * (size + GAP), index // COLUMNS * (size + GAP)))
    return whole.quantize(COLOURS, dither=Image.Dither.NONE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where pictures and figures are kept")
    parser.add_argument("--suites", nargs="*", default=list(STEP_LIMITS))
    parser.add_argument("--sheet", type=Path, help="also write them on one picture")
    parser.add_argument("--size", type=int, default=110, help="side of each, pixels")
    given = parser.parse_args()
    seen = look(given.suites, given.file)
    print(table(given.suites, seen))
    if given.sheet:
        sheet(given.suites, seen, given.size).save(given.sheet, optimize=True)
        print(f"{given.sheet}: {given.sheet.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
