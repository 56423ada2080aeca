"""Execution of evaluate.py's config, and evaluation at the end of a training."""

import errno
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from openvla_lightning import plugins
from openvla_lightning.checkpoint.format import CheckpointError, Description
from openvla_lightning.checkpoint.load import describe
from openvla_lightning.cli.help import groups
from openvla_lightning.cli.overrides import quoted
from openvla_lightning.config import (
    CONF,
    ConfigError,
    blaming_config,
    expand_home,
    find_checkpoint,
    for_people,
    validate,
)
from openvla_lightning.logger import log_results
from openvla_lightning.report.shards import EvaluationShard
from openvla_lightning.report.sweeps import RUNS_OWN
from openvla_lightning.run import job
from openvla_lightning.run.early import plain_values, wrong_types
from openvla_lightning.run.start import make_embedded
from openvla_lightning.runtime.files import writable
from openvla_lightning.statistics import UnknownDatasetError, choose_key
from openvla_lightning.types import key_of

MISSING = object()


@for_people(ConfigError, CheckpointError)
def evaluate(cfg: DictConfig) -> float | None:
    """Run the evaluation of `cfg`; return the success rate, or for recorded steps the token accuracy.

    Raises:
        ConfigError: something is wrong or missing; the message names it.
    """
    from openvla_lightning.env.base import kind_of  # training needs no simulator
    from openvla_lightning.evaluation.open_loop import StageError
    from openvla_lightning.evaluation.scoring import UNUSABLE

    expand_home(cfg)
    find_checkpoint(cfg, "run `python train.py` or `make demo` first")
    recipe = validate(cfg)
    if not writable(folder := Path(cfg.paths.output_dir)):
        raise ConfigError(f"paths.output_dir={folder}: nothing can be written there; choose another folder")
    env = instantiate(cfg.env, _convert_="all")
    kind = kind_of(env)
    if kind not in EVALUATIONS:
        raise ConfigError(f"env builds something of the kind {kind!r}; evaluated are {', '.join(EVALUATIONS)}")
    try:
        if cfg.ckpt_path and kind != "replay":
            description = check_policy(cfg.ckpt_path, cfg.unnorm_key)
            if kind == "held_out" and cfg.unnorm_key is None:
                names = [cfg.env.dataset] if cfg.env.get("dataset") else list(cfg.env.data.mix)
                cfg.unnorm_key = key_to_predict(description.norm_stats, names)
            if kind == "rollouts":
                check_shown(description, cfg.unnorm_key, cfg.policy.get("cameras"), env)
        return EVALUATIONS[kind](cfg, env, recipe)
    except (*UNUSABLE, StageError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"{error.filename or cfg.paths.output_dir}: {error.strerror}. Make room; the episodes that were played are "
            f"kept, and paths.output_dir={quoted(str(cfg.paths.output_dir))} goes on with them"
        ) from error


def score(cfg: DictConfig, env: Any, recipe: dict[str, Any]) -> float | None:
    """Roll episodes out in a world, or predict held-out steps; the config has the arguments of `scoring.evaluate`.

    The settings of every evaluation are at the top of the config, those of rollouts under `eval`.
    """
    from openvla_lightning.evaluation import scoring

    parameters = inspect.signature(scoring.evaluate).parameters
    arguments = {name: value for name, value in recipe.items() if name in parameters and name not in ("policy", "env")}
    loggers = list(instantiate(cfg.logger).values())
    results = scoring.evaluate(_policy(cfg), env, cfg.paths.output_dir, config=recipe, **arguments, **recipe["eval"])
    folder = (
        cfg.paths.output_dir
        if results.shard is None
        else EvaluationShard.parse(results.shard).folder(cfg.paths.output_dir)
    )
    for logger in loggers:
        log_results(logger, results, folder)
    return results.score


def compare_training(cfg: DictConfig, env: Any, recipe: dict[str, Any]) -> float | None:
    """Compare acting with training on training steps; see `open_loop.check_open_loop`."""
    from openvla_lightning.evaluation.open_loop import check_open_loop

    return check_open_loop(_policy(cfg), env, cfg.paths.output_dir).get("token_accuracy")


def replay(cfg: DictConfig, env: Any, recipe: dict[str, Any]) -> float | None:
    """Replay recorded episodes in their world; see `replay.check_replay`."""
    from openvla_lightning.evaluation.replay import check_replay

    if env.source.missing():
        make_embedded([env.dataset], Path(cfg.paths.data_dir))
    return check_replay(env, cfg.paths.output_dir)["success"]


EVALUATIONS: dict[str, Callable[[DictConfig, Any, dict[str, Any]], float | None]] = {
    "rollouts": score,
    "held_out": score,
    "open_loop": compare_training,
    "replay": replay,
}
"""The `kind` of the object that `env=` builds -> its evaluation, which returns one number."""


def _policy(cfg: DictConfig) -> Any:
    """A callable that loads the policy; it is called after the world is built or the data was found."""
    return instantiate(cfg.policy, _convert_="all")


def check_policy(path: str, unnorm_key: str | None) -> Description:
    """Check that a checkpoint exists and has the robot's statistics, before a world is built; return its description.

    Raises:
        ConfigError: there is nothing at `path`, its head is of a package that is not known here, or it has no
            statistics of `unnorm_key`; the message says what is known.
        CheckpointError: the checkpoint cannot be read.
    """
    try:
        description = describe(path)
        known = description.norm_stats
        if unnorm_key is not None:
            choose_key(known, unnorm_key)
    except FileNotFoundError as error:
        raise ConfigError(f"ckpt_path={path}: {error}") from error
    except UnknownDatasetError as error:
        raise ConfigError(
            f"ckpt_path={path}: {error}\n"
            f"The world's robot uses the units of {unnorm_key}, unless unnorm_key=... says otherwise; this checkpoint "
            f"was trained on {', '.join(known)}"
        ) from error
    head = str((description.processor.get("action_head") or {}).get("class"))
    if "." in head:  # a class of this package has no path
        with blaming_config():
            plugins.check(head)
    return description


def key_to_predict(norm_stats: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The dataset whose units a policy takes to predict held-out steps, if nobody says it: the first that it knows.

    Args:
        norm_stats: of the policy's checkpoint.
        names: the datasets to predict.

    Returns:
        None: there is none, or the checkpoint needs no key.
    """
    try:
        choose_key(norm_stats, None)
    except UnknownDatasetError:
        return next((name for name in names if name in norm_stats), None)
    return None


def check_shown(description: Description, unnorm_key: str | None, cameras: Sequence[str] | None, env: Any) -> None:
    """Check that a world shows what a policy needs, before it is built; only for worlds that say what they show.

    Args:
        description: of the policy's checkpoint.
        unnorm_key: the dataset whose units the policy uses.
        cameras: cameras that replace the checkpoint's own; None: they do not.
        env: builds the world.

    Raises:
        ConfigError: it does not; the message names what is missing, and the options that show it if there are any.
    """
    from openvla_lightning.env.base import world_of
    from openvla_lightning.evaluation.scoring import announced

    if (shown := announced(env, "keys_of")) is None:
        return
    reads, stats = description.processor, description.norm_stats
    cameras = list(cameras or reads.get("cameras") or [reads.get("camera", "primary")])
    state = reads.get("proprio", False) or "relative_to" in stats[choose_key(stats, unnorm_key)]["action"]
    needed = [*map(key_of, cameras), *["proprio"] * state]
    if absent := [key for key in needed if key not in shown]:
        views = f"[{','.join(cameras)}] env.proprio={str(state).lower()}"
        told = "views" in inspect.signature(world_of(env)).parameters
        raise ConfigError(
            f"ckpt_path={description.path}: this policy needs {', '.join(needed)}, and the world shows no "
            f"{', '.join(absent)}, but {', '.join(shown) or 'nothing'}" + f": say env.views={views}" * told
        )


def evaluation_after(cfg: DictConfig) -> DictConfig:
    """The config of the evaluation that `evaluate_after` asks for, of this training's model into the run's own folder.

    Raises:
        ConfigError: it names an option or a setting that evaluate.py does not have, or a value does not fit.
    """
    if not OmegaConf.is_dict(cfg.evaluate_after):
        raise ConfigError(
            f"evaluate_after={cfg.evaluate_after}: expected settings of evaluate.py, evaluate_after='{{env: tabletop}}'"
        )
    folder = cfg.paths.output_dir
    chosen = [text for text in job.overrides() if not text.startswith(RUNS_OWN)]
    varied = [text for text in chosen if "." not in text.partition("=")[0]]  # groups and top-level keys
    settings = {str(name): value for name, value in cfg.evaluate_after.items()}
    options = groups(CONF, "evaluate")
    for name in [name for name in settings if name in options and OmegaConf.is_config(settings[name])]:
        raise ConfigError(
            f"evaluate_after.{name}={settings[name]}: expected the name of an option; a setting of it is a key of its "
            f"own in a file, {name}.some_setting: 1"
        )
    try:
        evaluation = compose("evaluate", [f"{name}={value}" for name, value in settings.items() if name in options])
    except HydraException as error:
        raise ConfigError(f"evaluate_after: {str(error).partition('Config search path')[0].strip()}") from error
    values = {name: value for name, value in settings.items() if name not in options}
    values |= {"ckpt_path": folder, "paths.output_dir": f"{folder}/evaluation", "label": " ".join(varied) or "policy"}
    for name, value in values.items():  # set directly, because Hydra's grammar would parse special characters in a path
        if OmegaConf.select(evaluation, name, default=MISSING) is MISSING:
            raise ConfigError(f"evaluate_after: evaluate.py has no {name!r}")
        text = value.replace("${", "\\${") if isinstance(value, str) else value
        OmegaConf.update(evaluation, name, text, merge=False)
    if "wandb" in cfg.logger and not evaluation.logger:
        evaluation.logger = {"wandb": cfg.logger.wandb}
    if problems := wrong_types(plain_values(evaluation)):
        raise ConfigError("\n  ".join(["evaluate_after: these values do not fit:", *problems]))
    return evaluation
