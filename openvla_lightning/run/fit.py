"""Execution of train.py's and finetune.py's config."""

import logging
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from rich.console import Console

from openvla_lightning.callbacks import NonFiniteError
from openvla_lightning.callbacks.parameter_table import ParameterTable
from openvla_lightning.checkpoint.disk import CheckpointWriteError
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.config import ConfigError, blaming_config, for_people, validate
from openvla_lightning.cost.estimate import show
from openvla_lightning.data.cotraining import WithWords
from openvla_lightning.data.loader import SampleError
from openvla_lightning.data.preflight import DataError, MissingDataError
from openvla_lightning.module import VLAModule
from openvla_lightning.parallel import accumulate
from openvla_lightning.processor.chat import ChatProcessor
from openvla_lightning.report.run_page import is_run, write_run_page
from openvla_lightning.run import job
from openvla_lightning.run.evaluate import evaluate, evaluation_after
from openvla_lightning.run.folders import rank
from openvla_lightning.run.start import (
    adapter_base,
    check_folder,
    check_kept,
    check_same_model,
    check_strategy,
    preflight,
    resume_from,
    say_devices,
    say_unread,
    start_from,
)
from openvla_lightning.runtime.files import reserve

log = logging.getLogger(__name__)
logging.getLogger("lightning").handlers.clear()  # Hydra's handlers print and file its messages once
NOT_NEWS = ("Tip:", "TPU available")
"""Words of Lightning's lines that say nothing about this run."""
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: not any(words in record.getMessage() for words in NOT_NEWS)
)
warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning 2.6 on torch 2.15
warnings.filterwarnings("ignore", r".*module\(s\) in eval mode")  # what a strategy freezes is meant to be
warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it is a run that goes on
warnings.filterwarnings("ignore", ".*overridden `transfer_batch_to_device`")  # and the module's is meant to be used


FOR_PEOPLE = (
    *(ConfigError, CheckpointError, CheckpointWriteError, NonFiniteError),
    *(DataError, MissingDataError, SampleError, MisconfigurationException),
)


@for_people(*FOR_PEOPLE)
def fit(cfg: DictConfig) -> float | None:
    """Run the training of `cfg`; return the sweep's objective, if it names one.

    Raises:
        ConfigError: arguments, data, weights or hardware are wrong or missing; it lists all problems, within seconds.
        NonFiniteError: training diverges; it names the samples.
    """
    recipe = validate(cfg)
    say_devices(cfg)
    if cfg.estimate:
        names = ("model", "strategy", "action_head", "quantisation")
        model, strategy, head, quantisation = (instantiate(cfg[name], _convert_="all") for name in names)
        show(model, strategy, head, quantisation, recipe, Console())
        return None
    with ExitStack() as running:
        if rank() == 0:
            with blaming_config():
                running.enter_context(reserve(cfg.paths.output_dir, "training"))
        return _train(cfg, recipe)


def _train(cfg: DictConfig, recipe: dict[str, Any]) -> float | None:
    if (done := job.finished(cfg)) is not None:
        log.info(f"Done before: {cfg.paths.output_dir}")
        return done["objective"]
    evaluation = None if cfg.evaluate_after is None else evaluation_after(cfg)  # its mistakes are said before training
    resume = resume_from(cfg)
    check_folder(cfg, resume)
    if resume:
        check_same_model(resume, recipe)
    cfg.model.init_from = adapter_base(resume, cfg) if resume else start_from(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    processor = instantiate(cfg.processor, _convert_="all")
    datamodule = instantiate(cfg.data, collate=processor.collate, _convert_="all")
    preflight(cfg, datamodule, processor)
    for cotraining in getattr(datamodule, "cotraining", []):
        chat: Any = ChatProcessor.from_config(processor.config)
        datamodule.training_collate = WithWords(processor.collate, chat.collate, cotraining)
    say_unread(datamodule, processor)

    with blaming_config():
        names = ("model", "strategy", "quantisation")
        model, strategy, quantisation = (instantiate(cfg[name], _convert_="all") for name in names)
        check_kept(strategy, processor, recipe)
        check_strategy(strategy, model, processor, quantisation)
        module = VLAModule(
            model=model,
            strategy=strategy,
            optim=instantiate(cfg.optim, _convert_="all"),
            processor=processor,
            action_head=processor.action_head,
            recipe=recipe,
            quantisation=quantisation,
            checkpoint_activations=cfg.checkpoint_activations,
            compile_blocks=cfg.compile_blocks,
        )
    loggers, callbacks = list(instantiate(cfg.logger).values()), instantiate(cfg.callbacks, _convert_="all").values()
    trainer = instantiate(
        cfg.trainer,
        logger=loggers,
        # that monitor only logs, and refuses to start where nothing does
        callbacks=[ParameterTable(), *(c for c in callbacks if loggers or not isinstance(c, LearningRateMonitor))],
        _convert_="all",
    )
    with blaming_config():
        module.check(trainer.strategy)
        accumulate(trainer, cfg.data.global_batch_size, cfg.batch_size_per_device)
        if trainer.gradient_clip_algorithm not in (None, "norm"):
            raise ConfigError("trainer.gradient_clip_algorithm: gradients are clipped by their norm only; leave it out")
    if 0 < trainer.max_steps < trainer.log_every_n_steps:
        trainer.log_every_n_steps = trainer.max_steps  # such a short run logs once, at its end
    os.environ.setdefault("RUN_ID", Path(cfg.paths.output_dir).name)  # for processes that Lightning starts
    for logger in trainer.loggers:
        logger.log_hyperparams(recipe)
    trainer.fit(module, datamodule, ckpt_path=resume)
    log.info(f"Done: {cfg.paths.output_dir}")
    if evaluation is not None and trainer.is_global_zero:
        evaluate(evaluation)
    if trainer.is_global_zero and is_run(folder := Path(cfg.paths.output_dir)):
        log.info(f"What it learned: {write_run_page(folder)}")
    logged = trainer.callback_metrics
    if cfg.objective and cfg.objective not in logged:
        raise ConfigError(f"objective={cfg.objective} was not logged by this run; choose {', '.join(sorted(logged))}")
    objective = logged[cfg.objective].item() if cfg.objective else None
    if job.in_sweep() and trainer.is_global_zero:
        job.finish(cfg, objective)
    return objective
