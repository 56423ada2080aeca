"""What the scripts do with a composed config: check it, build from it, run it."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from openvla_lightning import demonstrations
from openvla_lightning.config import ConfigError, for_people, newest_checkpoint, validate
from openvla_lightning.model.checkpoint import check_source
from openvla_lightning.module import VLAModule

log = logging.getLogger(__name__)
logging.getLogger("lightning").handlers.clear()  # Hydra's handlers print and file its messages once


@for_people()
def fit(cfg: DictConfig) -> float | None:
    """Train or fine-tune what `cfg` describes; return the sweep objective, if it names one.

    Raises:
        ConfigError: naming everything that is wrong or missing (arguments, data, weights, hardware), in seconds.
    """
    recipe = validate(cfg)
    resume = resume_from(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    processor = instantiate(cfg.processor, _convert_="all")
    datamodule = instantiate(cfg.data, collate=processor.collate, _convert_="all")
    preflight(cfg, datamodule)

    module = VLAModule(
        model=instantiate(cfg.model, _convert_="all"),
        strategy=instantiate(cfg.strategy, _convert_="all"),
        optim=instantiate(cfg.optim, _convert_="all"),
        processor=processor,
        action_head=processor.action_head,
        recipe=recipe,
    )
    trainer = instantiate(
        cfg.trainer,
        logger=list(instantiate(cfg.logger).values()),
        callbacks=[ParameterTable(), *instantiate(cfg.callbacks, _convert_="all").values()],
        _convert_="all",
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(recipe)
    trainer.fit(module, datamodule, ckpt_path=resume)
    if trainer.interrupted:
        raise SystemExit(130)
    log.info(f"Done: {cfg.paths.output_dir}")
    return trainer.callback_metrics[cfg.objective].item() if cfg.objective else None


def resume_from(cfg: DictConfig) -> str | None:
    """The checkpoint to resume, or None to start afresh.

    Raises:
        ConfigError: when `ckpt_path` leads nowhere.
    """
    if cfg.ckpt_path is None:
        return None
    runs = Path(cfg.paths.log_dir) / cfg.run_name
    path = newest_checkpoint(runs) if cfg.ckpt_path == "last" else Path(cfg.ckpt_path)
    if path is None:
        raise ConfigError(f"ckpt_path=last: no checkpoint below {runs}/; leave ckpt_path out to start a run")
    if not path.is_file():
        raise ConfigError(f"ckpt_path={path}: no such file; ckpt_path=last finds the newest below {runs}/")
    log.info(f"Resuming {path}")
    return str(path)


def preflight(cfg: DictConfig, datamodule: Any) -> None:
    """Look for data, weights and hardware before anything slow starts.

    Raises:
        ConfigError: naming all that is missing and where to get it.
    """
    embedded = [name for name in datamodule.missing() if name in demonstrations.DATASETS]
    problems = []
    try:
        if embedded:
            log.info(
                f"Making the tabletop demonstrations that are not in {cfg.paths.data_dir} yet: {', '.join(embedded)}"
            )
            demonstrations.make(Path(cfg.paths.data_dir), embedded)
        datamodule.check()
    except (FileNotFoundError, ValueError) as error:
        problems.append(f"data: {error}")
    try:
        if cfg.model.init_from is not None:
            check_source(cfg.model.init_from)
    except (FileNotFoundError, ValueError) as error:
        problems.append(f"weights: {error}")
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        problems.append("hardware: this recipe asks for a GPU and torch sees none; +debug=tiny shrinks it to a CPU")
    if problems:
        raise ConfigError("\n  ".join(["this run cannot start:", *problems]))


class ParameterTable(L.Callback):
    """Prints once how many parameters each part has and how many of them learn."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table."""
        if trainer.is_global_zero:
            Console(stderr=True).print(parameter_table(pl_module.vla))  # type: ignore[arg-type]


def parameter_table(vla: torch.nn.Module) -> Table:
    """Rows part, parameters, learning; the last is the sum."""
    table = Table("part", title="Parameters", title_justify="left")
    for column in ("all", "learning"):
        table.add_column(column, justify="right")
    parts: Sequence[tuple[str, torch.nn.Module]] = [*vla.named_children(), ("total", vla)]
    for name, part in parts:
        counts = [sum(math.prod(p.shape) for p in ps) for ps in (part.parameters(), filter(_learns, part.parameters()))]
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _learns(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad
