"""Demonstrations of the embedded world as RLDS datasets: `python -m openvla_lightning.demonstrations`.

A scripted expert acts. Noise is added to the executed action but not to the recorded one, so that the data contains
recoveries. The executed actions are stored, too, for replays. In some episodes the robot stands still for a while, as
in teleoperation; the no-op filter removes these steps.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.data.source.writer import write_rlds
from openvla_lightning.env.tabletop import TRAINING_SEEDS, Tabletop, expert

IMAGE_SIZE = 96
ATTEMPTS = 16
"""Seeds that an episode may try; the first one nearly always succeeds."""
VERSION = "1.1.0"


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """One dataset of the embedded world.

    Attributes:
        world: arguments of `Tabletop`.
        train, val: episodes of each split.
        first_seed: seed of the first episode; the seeds of different datasets do not overlap.
        noise: standard deviation of the executed translation's error, as a share of an action's limit; each episode
            draws its own level between zero and twice this value.
        detour: chance per step that the arm moves in a random direction for two or three steps.
        decoy: chance per step that it heads for another object for three to six steps. Without this, the arm's
            motion gives the target away in most images, and a policy need not read the instruction.
        pause: chance per episode of 3 to 6 successive steps without motion.
    """

    world: dict[str, Any]
    train: int
    val: int
    first_seed: int
    noise: float = 0.3
    detour: float = 0.06
    decoy: float = 0.06
    pause: float = 0.2


THREE_CUBES = {"objects": ["red cube", "green cube", "blue cube"], "plates": [], "tidy": True}

DATASETS = {
    "tabletop_pretrain": Demonstrations({**THREE_CUBES, "tasks": ["touch_*", "lift_*"]}, 1200, 60, 0),
    "tabletop_finetune": Demonstrations(
        {**THREE_CUBES, "tasks": ["push_*_left", "push_*_right"], "embodiment": "relative"}, 300, 30, 100_000_000
    ),
    # For heads that predict chunks: what corrects a disturbance cannot be predicted before the disturbance.
    "tabletop_steady": Demonstrations(
        {**THREE_CUBES, "tasks": ["push_*_left", "push_*_right"], "embodiment": "relative"},
        1200,
        60,
        300_000_000,
        noise=0.1,
        detour=0.0,
        decoy=0.0,
        pause=0.0,
    ),
    "tabletop_full": Demonstrations(
        {
            "objects": ["red cube", "green cube", "blue cube", "yellow can", "red can", "blue can"],
            "plates": ["purple plate", "white plate"],
            "objects_per_scene": 4,
            "plates_per_scene": 1,
            "tolerance": 0.7,
            "max_episode_steps": 80,
        },
        6000,
        300,
        200_000_000,
    ),
}
EMBEDDED = ("tabletop_pretrain", "tabletop_finetune")
"""Datasets that `make demo` needs."""


def make(
    data_dir: str | Path, names: Sequence[str] = EMBEDDED, workers: int | None = None, episodes: int | None = None
) -> list[Path]:
    """Write datasets below `data_dir`, each as `<name>/<version>`; resume an interrupted call.

    Args:
        data_dir: the data directory.
        names: keys of `DATASETS`; a dataset that is already complete is not written again.
        workers: processes; None: one per core.
        episodes: number of episodes of each split `train`, for a quick test; these are the first ones of the whole
            dataset. `val` shrinks in proportion. None: all.

    Returns:
        The datasets' folders.

    Raises:
        ValueError: for an unknown name, or fewer than one episode.
    """
    if episodes is not None and episodes < 1:
        raise ValueError(f"{episodes} episodes are no dataset: give at least 1")
    if unknown := [name for name in names if name not in DATASETS]:
        raise ValueError(f"the embedded world has no dataset {', '.join(unknown)}; it has {', '.join(DATASETS)}")
    folders = []
    for name in names:
        plan = DATASETS[name]
        if episodes is not None and episodes < plan.train:
            plan = replace(plan, train=episodes, val=max(1, round(plan.val * episodes / plan.train)))
        folder = write_rlds(
            Path(data_dir) / name / VERSION,
            features(),
            {"train": plan.train, "val": plan.val},
            partial(episode, name),
            episodes_per_shard=50,
            workers=workers,
            recipe=asdict(plan),
            description="Scripted demonstrations of the tabletop world embedded in openvla_lightning.",
        )
        folders.append(folder)
    return folders


def features() -> Any:
    """The features of a step, in the form of tfds."""
    from tensorflow_datasets import features as tfds

    image = tfds.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8, encoding_format="jpeg")
    return tfds.FeaturesDict(
        {
            "steps": tfds.Dataset(
                {
                    "observation": tfds.FeaturesDict(
                        {"image": image, "proprio": tfds.Tensor(shape=(7,), dtype=np.float32)}
                    ),
                    "action": tfds.Tensor(shape=(7,), dtype=np.float32),
                    "executed_action": tfds.Tensor(shape=(7,), dtype=np.float32),
                    "language_instruction": tfds.Text(),
                    "reward": tfds.Scalar(dtype=np.float32),
                    "discount": tfds.Scalar(dtype=np.float32),
                    "is_first": tfds.Scalar(dtype=np.bool_),
                    "is_last": tfds.Scalar(dtype=np.bool_),
                    "is_terminal": tfds.Scalar(dtype=np.bool_),
                }
            ),
            "episode_metadata": tfds.FeaturesDict(
                {"task": tfds.Text(), "family": tfds.Text(), "seed": tfds.Scalar(dtype=np.int64)}
            ),
        }
    )


def episode(name: str, split: str, index: int) -> dict[str, Any]:
    """Demonstration `index` of a split: its first seed with which the expert succeeds.

    Each scene is shown with every task before the next scene. So the same picture needs different actions for different
    instructions, and a policy cannot learn by heart which object matters in which scene.

    Raises:
        RuntimeError: when the expert fails with all of its seeds.
    """
    plan, env = DATASETS[name], world(name)
    tasks = list(env.tasks)
    task, scene = tasks[index % len(tasks)], index // len(tasks)
    first = plan.first_seed + ATTEMPTS * (scene if split == "train" else plan.train + scene)
    for seed in range(first, first + ATTEMPTS):
        assert seed in TRAINING_SEEDS
        steps = demonstrate(env, plan, task, seed)
        if steps is not None:
            metadata = {"task": task, "family": env.task.family, "seed": seed}
            return {"steps": steps, "episode_metadata": metadata}
    raise RuntimeError(f"{name}: the expert failed at {task} with every seed from {first} to {first + ATTEMPTS - 1}")


@cache
def world(name: str) -> Tabletop:
    """The dataset's world, built once in each process."""
    return Tabletop(**DATASETS[name].world, image_size=IMAGE_SIZE)


def demonstrate(env: Tabletop, plan: Demonstrations, task: str, seed: int) -> list[dict[str, Any]] | None:
    """Roll the expert out with disturbances; return the recorded steps, or None if it did not succeed."""
    random = np.random.default_rng([seed, list(env.tasks).index(task)])
    observation, info = env.reset(seed=seed, options={"task": task})
    limit = env.embodiment.high
    level = random.uniform(0, 2 * plan.noise)
    pause = set(range(start := int(random.integers(2, 10)), start + int(random.integers(3, 7))))
    pause = pause if random.random() < plan.pause else set()
    gripper = float(env.opening > 0.5)
    astray: list[np.ndarray] = []
    steps: list[dict[str, Any]] = []
    done = False
    while not done:
        standing = len(steps) in pause
        action = np.array([*np.zeros(6), gripper]) if standing else expert(env)
        gripper = float(action[6])
        executed = action.copy()
        if not standing:
            astray = astray or lead_astray(env, plan, random, gripper)
            if astray:
                executed[[0, 1, 2, 6]] = astray.pop()
            executed[:3] += random.normal(size=3) * level * limit[:3]
        executed = executed.astype(np.float32)
        step = {
            "observation": observation,
            "action": action.astype(np.float32),
            "executed_action": executed,
            "language_instruction": info["instruction"],
            "is_first": not steps,
        }
        observation, reward, terminated, truncated, info = env.step(executed)
        done = terminated or truncated
        steps.append(step | {"reward": reward, "discount": 1.0, "is_last": done, "is_terminal": terminated})
    return steps if info["success"] else None


def lead_astray(env: Tabletop, plan: Demonstrations, random: np.random.Generator, gripper: float) -> list[np.ndarray]:
    """At random, a few commands [dx, dy, dz, gripper] that lead away from the task, in the environment's units."""
    limit, chance = env.embodiment.high[:3], random.random()
    if chance < plan.detour:
        flipped = 1 - gripper if random.random() < 0.3 else gripper
        return [np.array([*random.uniform(-1, 1, 3) * limit, flipped])] * int(random.integers(2, 4))
    others = [thing for thing in env.objects if thing is not env.task.target]
    if chance < plan.detour + plan.decoy and others and not env.holding(env.task.target):
        decoy = env.position(others[int(random.integers(len(others)))])
        goal = decoy + np.array([0.0, 0.0, random.uniform(0.05, 0.1)])
        way = env.embodiment.from_metric(np.array([*(goal - env.hand_position) / 2, 0, 0, 0, gripper]))
        return [way[[0, 1, 2, 6]]] * int(random.integers(3, 7))
    return []


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m openvla_lightning.demonstrations", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where datasets live (default: data)")
    parser.add_argument("--full", action="store_true", help="also make tabletop_full: all families, six objects")
    parser.add_argument(
        "--episodes", type=int, help="how many of each to train on, for a first try (default: all; 1,200 and 300)"
    )
    options = parser.parse_args(arguments)
    names = [*EMBEDDED, "tabletop_full"] if options.full else EMBEDDED
    try:
        folders = make(options.data_dir, names, episodes=options.episodes)
    except ValueError as error:  # too few episodes, or a folder that holds other ones
        raise SystemExit(f"error: {error}") from None
    for folder in folders:
        print(folder)


if __name__ == "__main__":
    main()
