"""Episodes per hour in the tabletop world or LIBERO: many simulators that share the policy's calls, or a single one.

    python benchmarks/rollout.py
    python benchmarks/rollout.py --envs 16 --workers 2 --episodes 24 --rounds 3
    MUJOCO_GL=egl python benchmarks/rollout.py --suite libero_spatial --envs 4 --workers 2 --episodes 12 --rounds 1

The same policy with random weights plays the same scenes in both ways, alternately. Episodes per hour are by wall-clock
time and by the CPU time of this process and its simulators. Every episode runs to its limit, because none succeeds.
"""

import argparse
import os
import statistics
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from openvla_lightning.bench_latency import MODELS, random_policy
from openvla_lightning.env.libero import Libero
from openvla_lightning.env.tabletop import Tabletop
from openvla_lightning.evaluation.plan import plan_episodes
from openvla_lightning.evaluation.rollout import rollout
from openvla_lightning.evaluation.timing import Stopwatch

TASKS, LIBERO_STEPS = 3, 60
"""How many tasks are played, and the actions of an episode of LIBERO, which are fewer than in its own protocol."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", help="of LIBERO; otherwise the tabletop world")
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world: Any = partial(Tabletop, tasks=["push_*_left"])
    if arguments.suite:
        world = partial(Libero, arguments.suite, max_episode_steps=LIBERO_STEPS)
    policy = random_policy(MODELS["tiny"], torch.device("cpu"), torch.float32, None)
    ways = {"one at a time": (1, 1), f"{arguments.envs} simulators": (arguments.envs, arguments.workers)}
    found: dict[str, list[tuple[float, float, dict[str, float]]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, (envs, workers) in ways.items():
            found[name].append(play(policy, world, envs, workers, arguments.episodes))
    table = Table("way", title=f"{arguments.episodes} episodes, medians of {arguments.rounds}")
    for column in ("episodes an hour", "episodes a CPU hour", "policy", "waiting", "simulator"):
        table.add_column(column, justify="right")
    for name, rounds in found.items():
        rates = [f"{statistics.median(taken[i] for taken in rounds):,.0f}" for i in (0, 1)]
        keys = ("policy_share", "waiting_share", "simulator_share")
        table.add_row(name, *rates, *(f"{statistics.median(taken[2][key] for taken in rounds):.0%}" for key in keys))
    Console().print(table)


def play(policy: Any, world: Any, envs: int, workers: int, episodes: int) -> tuple[float, float, dict[str, float]]:
    """Episodes per hour of wall-clock time, the same per hour of CPU time, and the shares of time."""
    stopwatch = Stopwatch()
    before = os.times()
    rollout(
        policy,
        world,
        lambda tasks: plan_episodes([*tasks.values()][:TASKS], -(-episodes // TASKS))[:episodes],
        num_envs=envs,
        num_workers=workers,
        stopwatch=stopwatch,
    )
    after = os.times()  # includes simulators that have ended, with their start
    cpu = sum(after[:4]) - sum(before[:4])
    told = stopwatch.summary(episodes)
    return told["episodes_per_hour"], 3600 * episodes / cpu, told


if __name__ == "__main__":
    main()
