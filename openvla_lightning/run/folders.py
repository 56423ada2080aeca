"""Gives every run a separate folder. Hydra calls this before it creates one; nothing heavy is imported."""

import copy
import os
from itertools import count
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from openvla_lightning.cli.overrides import quoted
from openvla_lightning.config import CONF, expanded

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
"""Environment variables with the number of a process; where Lightning starts a node's others, the first has no more."""
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
CLAIM = "started"
"""File in a run's `.hydra/` that its first process creates; no other process can create it again."""


class FreshFolder(Callback):
    """Gives a run or a sweep a folder of its own; a resumed one keeps its folder.

    Two trainings in one Slurm allocation have the same job id, and two that start in the same second have the same
    time: then the second folder gets a number, `4242_2`. If several processes share a run, they must agree on its name,
    so an existing folder is an error.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a single run."""
        _let_resolve(config)
        folder = Path(config.hydra.run.dir)
        goes_on = config.get("ckpt_path") == "last" and any(folder.glob("checkpoints/*.ckpt"))
        if not goes_on:
            _renew(config, config.hydra.run)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder of a sweep; its jobs have folders inside it."""
        _let_resolve(config)
        wanted = config.continue_sweep if "continue_sweep" in config else config.get("ckpt_path")
        if not (wanted == "last" and (Path(config.hydra.sweep.dir) / "multirun.yaml").exists()):
            _renew(config, config.hydra.sweep)
            with open_dict(config):  # Hydra composes each job's config anew
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(config.hydra.sweep.dir)}")


def log_dir(script: str = "train") -> Path:
    """The folder of the runs of `script`, according to environment variables and conf/local."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return Path(expanded(compose(script).paths.log_dir))


def claim(folder: Path, processes: int = 1) -> Path:
    """Create `folder`, with a number after its name if it exists, and return it.

    Args:
        folder: the folder for a run.
        processes: number of processes of the run; the first one creates the folder.

    Raises:
        FileExistsError: it exists, and several processes share its name.
    """
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        place.parent.mkdir(parents=True, exist_ok=True)
        if processes == 1:
            try:
                place.mkdir()
            except FileExistsError:
                continue
        try:
            (place / ".hydra").mkdir(parents=True, exist_ok=True)
            (place / ".hydra" / CLAIM).open("x", encoding="utf-8").close()
        except FileExistsError:
            raise FileExistsError(
                f"{folder} belongs to another run. Go on with it (ckpt_path=last), or give this one a name of its own "
                "in every process: RUN_ID=..."
            ) from None
        return place
    raise AssertionError("there is always another number")


def _let_resolve(config: DictConfig) -> None:
    """Allow Hydra's choices (`${hydra:...}`) in names of folders, which Hydra itself resolves only later.

    Raises:
        SystemExit: the run has no name.
    """
    if "runtime" in config.hydra:
        HydraConfig.instance().set_config(copy.deepcopy(config))
    if config.get("run_name", "") is None:
        raise SystemExit("error: run_name=null: a run's folder is made of its name; leave it out, or give a text")


def _renew(config: DictConfig, node: DictConfig) -> None:
    folder = Path(node.dir)
    chosen = any(text.startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for text in config.hydra.overrides.hydra)
    again = any(int(os.environ.get(name, 0)) for name in RESTARTS) and processes() > 1  # the folder is this run's
    if chosen or again or rank() > 0:
        return
    try:
        place = claim(folder, processes())
    except OSError as error:
        if error.errno is None:  # `claim` says it in words
            raise SystemExit(f"error: {error}") from None
        raise SystemExit(
            f"error: the run's folder {folder} cannot be made ({error.strerror}): choose another, paths.log_dir=..."
        ) from None
    if place != folder:
        with open_dict(node):
            node.dir = str(place)


def rank() -> int:
    """Number of this process among the run's processes."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def processes() -> int:
    """Number of processes that were started together for a run; Lightning may start more."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in os.environ else 1
