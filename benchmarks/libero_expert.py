"""How often the scripted expert solves each task of LIBERO, over the first initial states.

    python benchmarks/libero_expert.py build/libero_expert.json --states 10     # 40 tasks, half an hour on one core
    python benchmarks/libero_expert.py build/libero_expert.json --suites libero_goal

It runs without cameras, resumes an interrupted run, and prints a row per suite.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from openvla_lightning.env.libero import Libero
from openvla_lightning.env.libero.expert import Expert

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def play(env: Libero, task: str, state: int) -> int:
    """Number of steps to success, 0 without success."""
    env.reset(seed=state, options={"task": task})
    expert, steps = Expert(env), 0
    while True:
        _, _, success, truncated, _ = env.step(expert.act())
        steps += 1
        if success or truncated:
            return steps if success else 0


def look(suites: Sequence[str], states: int, file: Path) -> dict[str, int]:
    """Steps of every episode by `suite/task/state`; they are saved to `file` meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    played: dict[str, int] = json.loads(file.read_text()) if file.is_file() else {}
    for suite in suites:
        env = Libero(suite, views=())
        for number, task in enumerate(env.tasks):
            started = time.process_time()
            for state in range(states):
                if (name := f"{suite}/{number}/{state}") not in played:
                    played[name] = play(env, task, state)
                    file.write_text(json.dumps(played))
            steps = [played[f"{suite}/{number}/{state}"] for state in range(states)]
            print(f"{suite}/{number} {steps} {time.process_time() - started:.0f} s {task}", flush=True)
        env.close()
    return played


def table(played: dict[str, int], suites: Sequence[str], states: int) -> str:
    """A row per suite: successes of each task, their sum, and the length of a successful episode."""
    rows = ["| suite |" + "".join(f" {n} |" for n in range(10)) + " all | steps |", "|---|" + "---:|" * 12]
    for suite in suites:
        every = [[played[f"{suite}/{task}/{state}"] for state in range(states)] for task in range(10)]
        wins = [sum(steps > 0 for steps in task) for task in every]
        steps = [steps for task in every for steps in task if steps]
        cells = "".join(f" {win} |" for win in wins)
        rows.append(f"| {suite} |{cells} {sum(wins)} of {10 * states} | {mean(steps or [0]):.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the episodes are kept")
    parser.add_argument("--suites", nargs="*", default=list(SUITES))
    parser.add_argument("--states", type=int, default=10)
    given = parser.parse_args()
    print(table(look(given.suites, given.states, given.file), given.suites, given.states))


if __name__ == "__main__":
    main()
