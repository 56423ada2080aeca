"""A run as a job of a sweep: its overrides, and whether it was finished before."""

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from openvla_lightning.config import ConfigError
from openvla_lightning.runtime.files import write_json

FINISHED = "finished.json"
"""File that a job of a sweep writes when it is finished."""


def in_sweep() -> bool:
    """Whether this is one job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """This job's overrides, without `ckpt_path`."""
    return [text for text in HydraConfig.get().overrides.task if not text.startswith("ckpt_path=")]


def finish(cfg: DictConfig, objective: float | None) -> None:
    """Write into this job's folder that it is finished."""
    facts = {"overrides": overrides(), "objective": objective}
    write_json(Path(cfg.paths.output_dir) / FINISHED, facts)


def finished(cfg: DictConfig) -> dict[str, Any] | None:
    """The result that this job wrote in an earlier run of the sweep; None if it was not finished.

    Raises:
        ConfigError: its folder holds another job, because the sweep is a different one.
    """
    path = Path(cfg.paths.output_dir) / FINISHED
    if not in_sweep() or cfg.ckpt_path != "last" or not path.exists():
        return None
    done = json.loads(path.read_text(encoding="utf-8"))
    if done["overrides"] != overrides():
        raise ConfigError(
            f"{path.parent} holds the run `{' '.join(done['overrides'])}`, this is another: to continue a sweep, "
            "repeat its command and add ckpt_path=last; without that it starts afresh"
        )
    return done
