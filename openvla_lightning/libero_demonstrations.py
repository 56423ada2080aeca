"""Scripted LIBERO demonstrations in the layout of the released `libero_*_no_noops`.

    python -m openvla_lightning.libero_demonstrations data/libero_spatial_scripted/1.0.0
    python -m openvla_lightning.libero_demonstrations data/libero_object_scripted/1.0.0 --tasks 0 --states 20

The folder's name contains the suite. Every episode is first played without cameras, which takes a tenth of the time.
Failed episodes are dropped; successful ones are played again with the same actions and rendered. Both stages resume
after an interruption. Initial states 0 to 9 are left out, because `evaluate.py episodes_per_task=10` uses them.

The hand is pushed off its path at random and the correction is recorded: a policy that has only seen the direct path
cannot return to it.
"""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.source.processes import worker_pool
from openvla_lightning.data.source.writer import write_rlds
from openvla_lightning.env.libero import Libero
from openvla_lightning.env.libero.expert import Expert
from openvla_lightning.env.libero.protocol import RENDER_SIZE
from openvla_lightning.runtime.files import write_json, written_whole
from openvla_lightning.runtime.progress import Bar

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
STATES = {"val": range(10, 14), "train": range(14, 50)}
ATTEMPTS = 3
"""How often an initial state is played, each time with other pushes, before it is dropped."""
PUSHED_FOR = 12
"""Duration of a push in steps."""
STILL = 1e-4
"""A step with a smaller move and an unchanged gripper is a no-op, as in the filter of the released data."""


@dataclass(frozen=True, slots=True)
class LiberoDemonstrations:
    """A picklable function `(split, index) -> episode` over played episodes.

    Attributes:
        suite: name of LIBERO's suite.
        played: the files of `play_all`, by split.
    """

    suite: str
    played: dict[str, list[Path]]

    def __call__(self, split: str, index: int) -> dict[str, Any]:
        """Play an episode again and render it.

        Raises:
            RuntimeError: when it does not succeed again.
        """
        path = self.played[split][index]
        task, state = _task_and_state(path)
        episode = np.load(path)
        env = _environment(self.suite, ("primary", "wrist"))
        output, info = env.reset(seed=state, options={"task": list(env.tasks)[task]})
        steps = []
        for executed, recorded in zip(episode["executed"], episode["recorded"], strict=True):
            observation = {"image": output["image"], "wrist_image": output["wrist_image"], "state": output["proprio"]}
            words = info["instruction"]
            steps.append({"observation": observation, "action": recorded, "language_instruction": words})
            output, _, success, _, info = env.step(executed)
        if not success:
            raise RuntimeError(
                f"{path} succeeded when it was played and does not when it is drawn: it was played with other versions "
                "of the simulator; delete that folder to play anew"
            )
        return {"steps": steps}


def play(suite: str, task: int, state: int, pushes: float, path: Path) -> bool:
    """Play an initial state until the expert succeeds, write its actions, and return whether it succeeded.

    The file holds `executed` float64 [T, 7] in the units of `Libero`, and `recorded` float32 [T, 7], the expert's
    commands in LIBERO's own units (gripper -1 open, 1 closed). Both are empty if it failed.
    """
    executed: list[NDArray[np.float64]] = []
    recorded: list[NDArray[np.float32]] = []
    for attempt in range(ATTEMPTS):
        executed, recorded, success = _play_once(suite, task, state, pushes * (attempt < ATTEMPTS - 1), attempt)
        if success:
            break
        executed, recorded = [], []
    with written_whole(path) as beside, beside.open("wb") as file:
        np.savez(file, executed=np.array(executed), recorded=np.array(recorded))
    return bool(executed)


def _play_once(
    suite: str, task: int, state: int, pushes: float, attempt: int
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float32]], bool]:
    env, random = _environment(suite, ()), np.random.default_rng((task, state, attempt))
    env.reset(seed=state, options={"task": list(env.tasks)[task]})
    expert, push = Expert(env), np.zeros(3)
    executed: list[NDArray[np.float64]] = []
    recorded: list[NDArray[np.float32]] = []
    while True:
        if random.random() < 1 / PUSHED_FOR:
            push = random.normal(size=3) * pushes * (random.random() < 0.5)
        action = expert.act()
        wanted = action.astype(np.float32)
        wanted[6] = 1 - 2 * wanted[6]
        if expert.travelling:
            action[:3] = np.clip(action[:3] + push, -1, 1)
        if np.linalg.norm(action[:6]) < STILL and executed and executed[-1][6] == action[6]:
            continue
        executed.append(action)
        recorded.append(wanted)
        _, _, success, truncated, _ = env.step(action)
        if success or truncated:
            return executed, recorded, success


def play_all(
    folder: Path, suite: str, tasks: Sequence[int], states: Mapping[str, int], pushes: float, workers: int
) -> dict[str, list[Path]]:
    """Play the missing episodes of `folder` in parallel; return the files of the successful ones, by split."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {split: list(STATES[split])[: states[split]] for split in STATES}
    wanted = [(split, task, state) for task in tasks for split in STATES for state in chosen[split]]
    files = {(split, task, state): folder / f"task_{task}_state_{state:02d}.npz" for split, task, state in wanted}
    missing = {key: path for key, path in files.items() if not path.exists()}
    with Bar(f"playing {suite}", len(files), "episodes", done=len(files) - len(missing)) as bar:
        if missing:
            failed = 0
            with worker_pool(min(workers, len(missing))) as pool:
                pending = [pool.submit(play, suite, key[1], key[2], pushes, path) for key, path in missing.items()]
                for future in as_completed(pending):
                    failed += not future.result()
                    bar.advance(news=f"{failed} failed")
    return {split: [path for (s, *_), path in files.items() if s == split and _succeeded(path)] for split in STATES}


def _agree_on_pushes(folder: Path, pushes: float) -> None:
    """Write how hard the episodes in `folder` are pushed; raise ValueError if they were pushed otherwise before."""
    path = folder / "pushes.json"
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != pushes:
        raise ValueError(f"{folder} holds episodes of --pushes {found}: go on with it, or write to another folder")
    write_json(path, pushes)


def _succeeded(path: Path) -> bool:
    return len(np.load(path)["executed"]) > 0


def _task_and_state(path: Path) -> tuple[int, int]:
    _, task, _, state = path.stem.split("_")
    return int(task), int(state)


@cache
def _environment(suite: str, views: tuple[str, ...]) -> Libero:
    """The environment of this process, built once, because that takes seconds."""
    return Libero(suite, RENDER_SIZE, assets=os.environ.get("LIBERO_ASSETS"), views=views, proprio=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write the dataset, or resume an interrupted run."""
    import tensorflow_datasets as tfds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="<root>/<suite>_scripted/<version>")
    tasks, train, val = range(10), range(1, len(STATES["train"]) + 1), range(1, len(STATES["val"]) + 1)
    numbers: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=[*tasks], help="numbers in the suite", **numbers)
    parser.add_argument("--states", choices=train, default=36, help="states of each to train on, at most 36", **numbers)
    parser.add_argument("--validate", choices=val, default=4, help="and to validate on, at most 4", **numbers)
    parser.add_argument("--pushes", type=float, default=0.5, help="how hard, 1 being the fastest move")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; one per core")
    options = parser.parse_args(arguments)
    suite = re.sub("_(scripted|no_noops)$", "", options.folder.parent.name)
    if suite not in SUITES:
        names = ", ".join(f"{name}_scripted" for name in SUITES)
        parser.error(f"{options.folder}: the folder above the version is called after the suite, one of {names}")
    states = {"val": options.validate, "train": options.states}
    try:
        _agree_on_pushes(options.folder / "played", options.pushes)
    except ValueError as error:
        parser.error(str(error))
    played = play_all(options.folder / "played", suite, options.tasks, states, options.pushes, max(1, options.workers))
    if empty := [split for split, files in played.items() if not files]:
        parser.error(f"the expert solved no initial state for the split {empty[0]}; nothing is written")
    features = tfds.features
    image = features.Image(shape=(RENDER_SIZE, RENDER_SIZE, 3), encoding_format="jpeg")
    observation = {"image": image, "wrist_image": image, "state": features.Tensor(shape=(8,), dtype=np.float32)}
    step = {
        "observation": features.FeaturesDict(observation),
        "action": features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": features.Text(),
    }
    write_rlds(
        options.folder,
        features.FeaturesDict({"steps": features.Dataset(step)}),
        {split: len(files) for split, files in played.items()},
        LiberoDemonstrations(suite, played),
        episodes_per_shard=4,
        workers=options.workers,
        recipe={"suite": suite, "tasks": options.tasks, "states": states, "pushes": options.pushes},
        description="Demonstrations of a scripted expert in LIBERO",
    )


if __name__ == "__main__":
    main()
