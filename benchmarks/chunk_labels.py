"""How far recorded chunks are from what the undisturbed expert would do from the same state, in the tabletop world.

python benchmarks/chunk_labels.py --episodes 60

A policy that predicts a chunk of actions cannot know the disturbances that will follow, so this distance is an error
that no such policy can avoid. Beside it stands the error of a policy that always answers the median action. Both are
means over the three translations, as a share of an action's limit.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.demonstrations import DATASETS, demonstrate, world
from openvla_lightning.env.tabletop import Tabletop
from openvla_lightning.env.tabletop.expert import expert


def undisturbed(env: Tabletop, task: str, seed: int, executed: NDArray[np.float32], chunk: int) -> NDArray[np.float64]:
    """The expert's next actions [chunk, 7] after `executed` [T, 7] was executed in a scene."""
    env.reset(seed=seed, options={"task": task})
    for action in executed:
        env.step(action)
    actions = []
    for _ in range(chunk):
        actions.append(expert(env))
        env.step(actions[-1].astype(np.float32))
    return np.array(actions)


def main() -> None:
    """Print a row for each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["tabletop_finetune", "tabletop_steady"], choices=DATASETS)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--chunk", type=int, default=8)
    given = parser.parse_args()
    for name in given.datasets:
        plan, env = DATASETS[name], world(name)
        limit, tasks = env.embodiment.high[:3], list(env.tasks)
        errors, medians = [], []
        for episode in range(given.episodes):
            task, seed = tasks[episode % len(tasks)], plan.first_seed + episode
            steps = demonstrate(env, plan, task, seed)
            if steps is None:
                continue
            recorded = np.array([step["action"] for step in steps])[:, :3]
            executed = np.array([step["executed_action"] for step in steps])
            for start in range(0, len(steps) - given.chunk, 4):
                wanted = undisturbed(env, task, seed, executed[:start], given.chunk)[:, :3]
                chunk = recorded[start : start + given.chunk]
                errors.append(np.abs(chunk - wanted) / limit)
                medians.append(np.abs(chunk - np.median(recorded, axis=0)) / limit)
        by_step = " ".join(f"{error:.2f}" for error in np.mean(errors, axis=(0, 2)))
        print(
            f"{name}: {np.mean(errors):.2f} from the undisturbed expert (by step of the chunk: {by_step}), "
            f"{np.mean(medians):.2f} from the median action; {len(errors)} chunks"
        )


if __name__ == "__main__":
    main()
