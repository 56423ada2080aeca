"""What the scripts do with a composed config: check it, build from it, run it."""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from openvla_lightning import job
from openvla_lightning.callbacks import NonFiniteError
from openvla_lightning.callbacks.parameters import ParameterTable
from openvla_lightning.checkpoint.disk import CheckpointWriteError
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.load import describe
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.config import ConfigError, for_people, validate
from openvla_lightning.cost.estimate import show
from openvla_lightning.logger import log_results
from openvla_lightning.model.hub import check_source
from openvla_lightning.module import VLAModule
from openvla_lightning.parallel import accumulate
from openvla_lightning.processor import Processor
from openvla_lightning.report.sweeps import RUNS_OWN

log = logging.getLogger(__name__)
logging.getLogger("lightning").handlers.clear()  # Hydra's handlers print and file its messages once
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())
warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning 2.6 on torch 2.15

EVALUATION_ARGUMENTS = (
    *("tasks", "task_set", "episodes_per_task", "interval_width", "seed", "instructions", "num_envs", "num_workers"),
    *("save_videos", "label"),
)


@for_people(ConfigError, CheckpointError, CheckpointWriteError, NonFiniteError)
def fit(cfg: DictConfig) -> float | None:
    """Train or fine-tune what `cfg` describes; return the sweep objective, if it names one.

    Raises:
        ConfigError: naming everything that is wrong or missing (arguments, data, weights, hardware), in seconds.
        NonFiniteError: naming the samples, when training diverges.
    """
    recipe = validate(cfg)
    if cfg.estimate:
        names = ("model", "strategy", "action_head", "quantisation")
        model, strategy, head, quantisation = (instantiate(cfg[name], _convert_="all") for name in names)
        show(model, strategy, head, quantisation, recipe, Console())
        return None
    if (done := job.finished(cfg)) is not None:
        log.info(f"Done before: {cfg.paths.output_dir}")
        return done["objective"]
    resume = resume_from(cfg)
    cfg.model.init_from = adapter_base(resume, cfg) if resume else start_from(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    processor = instantiate(cfg.processor, _convert_="all")
    datamodule = instantiate(cfg.data, collate=processor.collate, _convert_="all")
    preflight(cfg, datamodule, processor)

    try:
        module = VLAModule(
            model=instantiate(cfg.model, _convert_="all"),
            strategy=instantiate(cfg.strategy, _convert_="all"),
            optim=instantiate(cfg.optim, _convert_="all"),
            processor=processor,
            action_head=processor.action_head,
            recipe=recipe,
            quantisation=instantiate(cfg.quantisation, _convert_="all"),
            checkpoint_activations=cfg.checkpoint_activations,
            compile_blocks=cfg.compile_blocks,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    trainer = instantiate(
        cfg.trainer,
        logger=list(instantiate(cfg.logger).values()),
        callbacks=[ParameterTable(), *instantiate(cfg.callbacks, _convert_="all").values()],
        _convert_="all",
    )
    try:
        module.check(trainer.strategy)
        accumulate(trainer, cfg.data.global_batch_size, cfg.batch_size_per_device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    os.environ.setdefault("RUN_ID", Path(cfg.paths.output_dir).name)  # for processes that Lightning starts
    for logger in trainer.loggers:
        logger.log_hyperparams(recipe)
    trainer.fit(module, datamodule, ckpt_path=resume)
    if trainer.interrupted:
        raise SystemExit(130)
    log.info(f"Done: {cfg.paths.output_dir}")
    if cfg.evaluate_after is not None and trainer.is_global_zero:
        evaluate_run(cfg)
    objective = trainer.callback_metrics[cfg.objective].item() if cfg.objective else None
    if job.in_sweep() and trainer.is_global_zero:
        job.finish(cfg, objective)
    return objective


def evaluate_run(cfg: DictConfig) -> None:
    """Evaluate what was just trained as `evaluate_after` says, into the run's own folder."""
    folder = cfg.paths.output_dir
    chosen = [text for text in job.overrides() if not text.startswith(RUNS_OWN)]
    varied = [text for text in chosen if "." not in text.partition("=")[0]]  # groups and what stands at the top
    own = [f"ckpt_path={folder}", f"paths.output_dir={folder}/evaluation", f"label='{' '.join(varied) or 'policy'}'"]
    evaluation = compose("evaluate", [*own, *(f"{name}={value}" for name, value in cfg.evaluate_after.items())])
    if "wandb" in cfg.logger and not evaluation.logger:
        evaluation.logger = {"wandb": cfg.logger.wandb}
    evaluate(evaluation)


@for_people(ConfigError, CheckpointError)
def evaluate(cfg: DictConfig) -> float | None:
    """Evaluate what `cfg` describes; return the success rate, or for recorded steps the token accuracy.

    Raises:
        ConfigError: naming what is wrong or missing.
    """
    from openvla_lightning.env.recorded import (
        Replay,
        TrainingSteps,  # training needs no simulator
    )
    from openvla_lightning.evaluation import scoring
    from openvla_lightning.evaluation.open_loop import check_open_loop
    from openvla_lightning.evaluation.replay import check_replay

    if cfg.ckpt_path == "last":
        newest = newest_checkpoint(cfg.paths.log_dir)
        if newest is None:
            raise ConfigError(
                f"no checkpoint below {cfg.paths.log_dir}/ yet; run `python train.py` or `make demo` first"
            )
        log.info(f"Evaluating {newest}")
        cfg.ckpt_path = str(newest)
    elif cfg.ckpt_path and Path(cfg.ckpt_path).is_dir():
        # A run or a folder of runs: the newest. The file, as results are kept by its hash and may lie in that folder.
        cfg.ckpt_path = str(newest_checkpoint(cfg.ckpt_path) or cfg.ckpt_path)
    recipe = validate(cfg)
    arguments = {name: recipe[name] for name in EVALUATION_ARGUMENTS} | recipe["eval"]
    policy = instantiate(cfg.policy, _convert_="all")  # a partial: loaded once the world is up
    env = instantiate(cfg.env, _convert_="all")
    try:
        if isinstance(env, Replay):
            if env.source.missing():
                make_embedded([env.dataset], Path(cfg.paths.data_dir))
            return check_replay(env, cfg.paths.output_dir)["success"]
        if isinstance(env, TrainingSteps):
            return check_open_loop(policy, env, cfg.paths.output_dir).get("token_accuracy")
        loggers = list(instantiate(cfg.logger).values())
        results = scoring.evaluate(policy, env, cfg.paths.output_dir, config=recipe, **arguments)
    except scoring.UNUSABLE as error:
        raise ConfigError(str(error)) from error
    for logger in loggers:
        log_results(logger, results, cfg.paths.output_dir)
    return results.score


@for_people(ConfigError)
def data_report(cfg: DictConfig) -> None:
    """Look at the datasets that `cfg` describes: write a report into the run's folder.

    Raises:
        ConfigError: naming what is wrong or missing.
    """
    from openvla_lightning.data.report.facts import selections
    from openvla_lightning.data.report.pages import write_report

    validate(cfg)
    cfg.data.curriculum = None  # nothing is trained: the shares are those of the beginning
    datamodule = instantiate(cfg.data, collate=list, _convert_="all")
    check_all(data=lambda: find_data(cfg, datamodule))
    try:
        datamodule.prepare_data()
        datamodule.setup()
        title = f"Data: {Path(cfg.run_name).name}, no-op filter {datamodule.noop_filter}"
        path = write_report(selections(datamodule), Path(cfg.paths.output_dir), title)
    except ValueError as error:  # of the mixture, or of a damaged file
        raise ConfigError(str(error)) from error
    log.info(f"Written to {path.parent}: report.md, report.html")


def resume_from(cfg: DictConfig) -> str | None:
    """The checkpoint to resume, or None to start afresh.

    Raises:
        ConfigError: when `ckpt_path` leads nowhere.
    """
    if cfg.ckpt_path is None:
        return None
    runs = Path(cfg.paths.output_dir) if job.in_sweep() else Path(cfg.paths.log_dir) / cfg.run_name
    path = newest_checkpoint(runs) if cfg.ckpt_path == "last" else Path(cfg.ckpt_path)
    if path is None and job.in_sweep():
        return None  # this job of a continued sweep had not begun
    if path is None:
        raise ConfigError(f"ckpt_path=last: no checkpoint below {runs}/; leave ckpt_path out to start a run")
    if not path.exists():
        raise ConfigError(f"ckpt_path={path}: no such checkpoint; ckpt_path=last finds the newest below {runs}/")
    log.info(f"Resuming {path}")
    return str(path)


def adapter_base(checkpoint: str, cfg: DictConfig) -> str | None:
    """What to build before `checkpoint` is loaded: an adapter's base; None for one that brings all weights along.

    A base that has moved may be named by `model.init_from`; its hash decides whether it is the one.
    """
    base = describe(checkpoint).base
    if base is None:
        return None
    try:
        check_source(base.path)
    except FileNotFoundError:
        return start_from(cfg)
    return base.path


def start_from(cfg: DictConfig) -> str | None:
    """Whose weights to start from: `model.init_from`, where a folder of runs means its newest checkpoint.

    Raises:
        ConfigError: when the folder of runs holds no checkpoint.
    """
    source = cfg.model.init_from
    if source is None or (path := newest_checkpoint(source)) is None:
        if source is not None and Path(source).is_relative_to(cfg.paths.log_dir):
            raise ConfigError(
                f"model.init_from={source}: no checkpoint below it; pretrain first (python train.py, or make demo), "
                "name another one (model.init_from=...), or start from random weights (model.init_from=null)"
            )
        return source
    log.info(f"Starting from {path}")
    return str(path)


def preflight(cfg: DictConfig, datamodule: Any, processor: Processor) -> None:
    """Look for data, weights, tokenizer and hardware before anything slow starts.

    Raises:
        ConfigError: naming all that is missing and where to get it.
    """

    def find_weights() -> None:
        if cfg.model.init_from is not None:
            check_source(cfg.model.init_from)

    def find_hardware() -> None:
        if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError("this recipe asks for a GPU and torch sees none; +debug=tiny shrinks it to a CPU")

    def find_tokenizer() -> None:
        _ = processor.tokenizer

    check_all(
        data=lambda: find_data(cfg, datamodule), weights=find_weights, tokenizer=find_tokenizer, hardware=find_hardware
    )


def check_all(**checks: Callable[[], None]) -> None:
    """Raise ConfigError with everything that `checks`, by name, find to be missing or wrong."""
    problems = []
    for what, check in checks.items():
        try:
            check()
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"{what}: {error}")
    if problems:
        raise ConfigError("\n\n  ".join(["this run cannot start:", *problems]))


def find_data(cfg: DictConfig, datamodule: Any) -> None:
    """Make what the embedded world can make; raise MissingDataError for the rest."""
    if (missing := datamodule.missing()) and "://" not in str(cfg.paths.data_dir):
        make_embedded(missing, Path(cfg.paths.data_dir))
    datamodule.check()


def make_embedded(missing: Sequence[str], data_dir: Path) -> None:
    """Make those of the missing datasets that the embedded world can make."""
    from openvla_lightning import demonstrations  # brings the simulator along

    if names := [name for name in missing if name in demonstrations.DATASETS]:
        log.info(f"Making demonstrations that are not in {data_dir} yet: {', '.join(names)}")
        demonstrations.make(data_dir, names)
