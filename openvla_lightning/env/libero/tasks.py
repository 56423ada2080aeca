"""Which tasks a suite of LIBERO has, without its simulator: the benchmark's own lists, words and initial states."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openvla_lightning.env.base import RequestError, Task
from openvla_lightning.env.libero import engine
from openvla_lightning.env.libero.protocol import PERTURBATIONS, REWORDED, STEP_LIMITS


def tasks_of(
    suite: str, *, assets: str | Path | None = None, perturbation: str | None = None, **options: object
) -> Mapping[str, Task]:
    """Every task by name that a `Libero` with these arguments has; no world is built, and no mesh is read.

    Raises:
        RequestError: for an unknown suite or perturbation.
        ImportError: when the extra is not installed, with the command that installs it.
        FileNotFoundError: when there are no meshes and textures, without which no world could be built.
    """
    check_suite(suite, perturbation)
    return listed(engine.read_benchmark(suite, perturbation, engine.find_assets(assets)), suite, perturbation)


def check_suite(suite: str, perturbation: str | None) -> None:
    """Raise RequestError for a suite that LIBERO does not have, or a perturbation that LIBERO-PRO has not of it."""
    if suite not in STEP_LIMITS:
        raise RequestError(f"suite={suite!r} is unknown; choose one of {', '.join(STEP_LIMITS)}")
    if perturbation is not None and (perturbation not in PERTURBATIONS or suite == "libero_90"):
        raise RequestError(
            f"perturbation={perturbation!r} of {suite} is unknown: LIBERO-PRO has {', '.join(PERTURBATIONS)} of "
            "libero_spatial, libero_object, libero_goal and libero_10"
        )


def listed(benchmark: Any, suite: str, perturbation: str | None) -> Mapping[str, Task]:
    """Every task of the engine's description of a suite by name, in its order."""
    with engine.quietly():
        counts = [len(benchmark.get_task_init_states(index)) for index in range(benchmark.n_tasks)]
    return {
        task.name: Task(task.name, suite, _words(benchmark, index, perturbation), initial_states=counts[index])
        for index, task in enumerate(benchmark.tasks)
    }


def _words(benchmark: Any, index: int, perturbation: str | None) -> str:
    """The words of a task: its file's name, as in the training data, or where LIBERO-PRO has others, those.

    LIBERO-PRO keeps the file names of the tasks that it rewords, and in other tasks' files has words that no policy was
    trained on ("pick up the akita black bowl ..."), although nothing was to change in them.
    """
    if perturbation not in REWORDED:
        return benchmark.tasks[index].language
    path = Path(benchmark.get_task_bddl_file_path(index))
    words = re.search(r"\(:language\s+([^)]*)\)", path.read_text(encoding="utf-8"))
    if words is None:
        raise ValueError(f"{path} holds no (:language ...)")
    return " ".join(words[1].split())
