"""What evaluate.py does with a composed config, and how a training evaluates itself."""

import logging
from pathlib import Path

from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.load import describe
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.cli.help import groups
from openvla_lightning.config import CONF, ConfigError, expand_home, for_people, validate
from openvla_lightning.logger import log_results
from openvla_lightning.report.shards import Shard
from openvla_lightning.report.sweeps import RUNS_OWN
from openvla_lightning.run import job
from openvla_lightning.run.start import make_embedded
from openvla_lightning.statistics import UnknownDatasetError, choose_key

log = logging.getLogger(__name__)

MISSING = object()
EVALUATION_ARGUMENTS = (
    *("tasks", "task_set", "episodes_per_task", "interval_width", "seed", "instructions", "num_envs", "num_workers"),
    *("save_videos", "label"),
)


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

    expand_home(cfg)
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
    if cfg.ckpt_path and not isinstance(env, Replay):
        check_policy(cfg.ckpt_path, cfg.unnorm_key)
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
    folder = cfg.paths.output_dir if results.shard is None else Shard.parse(results.shard).folder(cfg.paths.output_dir)
    for logger in loggers:
        log_results(logger, results, folder)
    return results.score


def check_policy(path: str, unnorm_key: str | None) -> None:
    """See that a checkpoint is there and knows the robot, before a world is started for it.

    Raises:
        ConfigError: nothing is at `path`, or it holds no statistics of `unnorm_key`; naming what there is.
        CheckpointError: what is there cannot be read.
    """
    try:
        known = describe(path).norm_stats
        if unnorm_key is not None:
            choose_key(known, unnorm_key)
    except (FileNotFoundError, UnknownDatasetError) as error:
        raise ConfigError(f"ckpt_path={path}: {error}") from error


def evaluate_run(cfg: DictConfig) -> None:
    """Evaluate what was just trained as `evaluate_after` says, into the run's own folder."""
    folder = cfg.paths.output_dir
    chosen = [text for text in job.overrides() if not text.startswith(RUNS_OWN)]
    varied = [text for text in chosen if "." not in text.partition("=")[0]]  # groups and what stands at the top
    asked = {str(name): value for name, value in cfg.evaluate_after.items()}
    options = groups(CONF, "evaluate")
    evaluation = compose("evaluate", [f"{name}={value}" for name, value in asked.items() if name in options])
    values = {name: value for name, value in asked.items() if name not in options}
    values |= {"ckpt_path": folder, "paths.output_dir": f"{folder}/evaluation", "label": " ".join(varied) or "policy"}
    for name, value in values.items():  # set, not written as text: a path may hold what Hydra's grammar reads
        if OmegaConf.select(evaluation, name, default=MISSING) is MISSING:
            raise ConfigError(f"evaluate_after: evaluate.py has no {name!r}")
        text = value.replace("${", "\\${") if isinstance(value, str) else value
        OmegaConf.update(evaluation, name, text, merge=False)
    if "wandb" in cfg.logger and not evaluation.logger:
        evaluation.logger = {"wandb": cfg.logger.wandb}
    evaluate(evaluation)
