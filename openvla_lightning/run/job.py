"""What a run knows of the sweep it is part of: its place in it, and whether it was done before."""

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from openvla_lightning.config import ConfigError
from openvla_lightning.runtime.files import write_json

FINISHED = "finished.json"
"""What a job of a sweep leaves when all of it is done."""


def in_sweep() -> bool:
    """Whether this is one job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """This job's overrides, without `ckpt_path`."""
    return [text for text in HydraConfig.get().overrides.task if not text.startswith("ckpt_path=")]


def finish(cfg: DictConfig, objective: float | None) -> None:
    """Leave in this job's folder that it is done."""
    facts = {"overrides": overrides(), "objective": objective}
    write_json(Path(cfg.paths.output_dir) / FINISHED, facts)


def finished(cfg: DictConfig) -> dict[str, Any] | None:
    """What this job of a continued sweep left when it ended; None when it did not.

    Raises:
        ConfigError: when its folder holds another job: the sweep is not the one that is continued.
    """
    path = Path(cfg.paths.output_dir) / FINISHED
    if not in_sweep() or cfg.ckpt_path != "last" or not path.exists():
        return None
    done = json.loads(path.read_text())
    if done["overrides"] != overrides():
        raise ConfigError(
            f"{path.parent} holds the run `{' '.join(done['overrides'])}`, this is another: to continue a sweep, "
            "repeat its command and add ckpt_path=last; without that it starts afresh"
        )
    return done
