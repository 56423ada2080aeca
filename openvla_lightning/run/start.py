"""Steps before a run: finding its checkpoint, and checking data, weights, tokenizer and hardware."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from openvla_lightning import plugins
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.config import ConfigError, blaming_config, for_people, validate
from openvla_lightning.model.hub import check_source
from openvla_lightning.model.vla import VLA
from openvla_lightning.processor import Processor
from openvla_lightning.quantisation import Quantiser, quantised_names
from openvla_lightning.run import job
from openvla_lightning.run.folders import rank
from openvla_lightning.runtime.cores import available_cores
from openvla_lightning.runtime.files import writable
from openvla_lightning.strategy import USUAL, Strategy

log = logging.getLogger(__name__)
MAY_DIFFER = ("init_from", "init_dtype", "tokenizer")
"""Settings that a resumed run may change: what they name may have moved, and is checked when it is loaded."""


def resume_from(cfg: DictConfig) -> str | None:
    """The checkpoint to resume from; None for a new run.

    Raises:
        ConfigError: when there is no checkpoint at `ckpt_path`.
    """
    if cfg.ckpt_path is None:
        return None
    runs = Path(cfg.paths.output_dir) if job.in_sweep() else Path(cfg.paths.log_dir) / cfg.run_name
    path = newest_checkpoint(runs) if cfg.ckpt_path == "last" else Path(cfg.ckpt_path)
    if path is None and job.in_sweep():
        return None  # this job of a resumed sweep had not started
    if path is None:
        raise ConfigError(f"ckpt_path=last: no checkpoint below {runs}/; leave ckpt_path out to start a run")
    if not path.exists():
        raise ConfigError(f"ckpt_path={path}: no such checkpoint; ckpt_path=last finds the newest below {runs}/")
    if path.is_dir() and path.suffix != ".ckpt":  # the folder of a run means its newest one; a sharded one is a folder
        folder, path = path, newest_checkpoint(path)
        if path is None:
            raise ConfigError(
                f"ckpt_path={folder}: no checkpoint below this folder; leave ckpt_path out to start a run"
            )
    log.info(f"Resuming {path}")
    return str(path)


def check_folder(cfg: DictConfig, resume: str | None) -> None:
    """Create the run's folder and check that it holds no other run, unless this one resumes it.

    Raises:
        ConfigError: it is not writable, or holds checkpoints or numbers of another run.
    """
    folder = Path(cfg.paths.output_dir)
    if not writable(folder):
        raise ConfigError(f"paths.output_dir={folder}: nothing can be written there; choose another folder")
    taken = [*folder.glob("checkpoints/*.ckpt"), *folder.glob("metrics.csv")]
    if taken and resume is None and rank() == 0:
        raise ConfigError(
            f"{folder} holds another run ({taken[0].relative_to(folder)}): go on with it (ckpt_path=last), or leave "
            "paths.output_dir out, so that this run gets a folder of its own"
        )


def check_same_model(checkpoint: str, recipe: Mapping[str, Any]) -> None:
    """Check that a resumed run builds the same model, learns the same weights of it and shows it the same.

    Raises:
        ConfigError: settings differ; it lists them with both values.
    """
    old, new = (_flat(_lasting(tree)) for tree in (describe(checkpoint).recipe, recipe))
    changed = [
        f"{key}: {old[key]!r} -> {new[key]!r}"
        for key in old
        if key in new and old[key] != new[key] and key.rpartition(".")[2] not in MAY_DIFFER
    ]
    if changed:
        raise ConfigError(
            "\n  ".join([f"{checkpoint} cannot go on with another model; say the same as before:", *changed])
        )


def _lasting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What has to stay as it was while a run goes on."""
    parts = {name: recipe.get(name) or {} for name in ("model", "action_head", "strategy", "processor", "data")}
    parts["processor"] = {key: value for key, value in parts["processor"].items() if key != "action_head"}  # the same
    parts["data"] = {key: value for key, value in parts["data"].items() if key == "normalisation"}
    return parts


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def adapter_base(checkpoint: str, cfg: DictConfig) -> str | None:
    """The adapter's base to build before `checkpoint` is loaded; None for a checkpoint with all weights.

    If the base was moved, `model.init_from` may name its new place; its hash is checked.
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
    """The checkpoint to start from: `model.init_from`, where a folder of runs means its newest checkpoint.

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
    """Check data, weights, tokenizer and hardware before anything slow starts.

    Raises:
        ConfigError: something is missing; it lists everything and where to get it.
    """

    def find_weights() -> None:
        if cfg.model.init_from is not None:
            check_source(cfg.model.init_from)

    def find_hardware() -> None:
        if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError("this recipe asks for a GPU and torch sees none; +debug=tiny shrinks it to a CPU")
        devices, no_gpu = cfg.trainer.get("devices", "auto"), not torch.accelerator.is_available()
        if (no_gpu or cfg.trainer.accelerator == "cpu") and not (devices == "auto" or _counts(devices)):
            raise ValueError(
                f"trainer.devices={devices} chooses among GPUs, and this run is on a CPU: give a number of processes, "
                "trainer.devices=1"
            )

    def find_tokenizer() -> None:
        _ = processor.tokenizer

    check_all(
        data=lambda: find_data(cfg, datamodule), weights=find_weights, tokenizer=find_tokenizer, hardware=find_hardware
    )


def check_kept(strategy: Strategy, processor: Processor, recipe: Mapping[str, Any]) -> None:
    """Check that checkpoints of this run can bring back its strategy and its action head.

    Raises:
        ValueError: they cannot; see `plugins.check_kept`.
    """
    plugins.check_kept(processor.action_head, plugins.USUAL_HEAD, recipe["action_head"])
    plugins.check_kept(strategy, USUAL, recipe["strategy"])


def _counts(devices: Any) -> bool:
    """Whether `trainer.devices` is a number of devices, and not a choice of some."""
    return str(devices).isdecimal() and int(devices) > 0


def check_strategy(
    strategy: Strategy, model: Callable[..., VLA], processor: Processor, quantisation: Quantiser | None = None
) -> None:
    """Apply `strategy` to a model without weights, before data are read and weights are loaded.

    Raises:
        ConfigError: it names a part or modules that this model does not have, or lets learn what is quantised.
    """
    sizes = {"proprio_dim": 1} if processor.proprio else {}
    try:
        # Some towers are built on a CPU first, and would draw what the training is to draw.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            vla = model(action_head=processor.action_head, **sizes)
            quantised = quantised_names(vla, quantisation.keep) if quantisation is not None and strategy.adapts else []
            strategy.apply(vla)
        if learning := [name for name in quantised if vla.get_submodule(name).weight.requires_grad]:
            raise ValueError(
                f"{', '.join(learning)[:200]} are quantised and cannot learn: add their part to quantisation.keep, or "
                "leave it out of what learns"
            )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"strategy: {error.args[0]}") from error
    except RuntimeError:
        return  # it needs the weights themselves, and is applied to them later


def say_unread(datamodule: Any, processor: Any) -> None:
    """Warn of cameras that are loaded but not used, and of states that are described but not loaded."""
    read, loaded = set(getattr(processor, "cameras", ())), list(getattr(datamodule, "cameras", ()))
    if read and (idle := [camera for camera in loaded if camera not in read]):
        log.warning(
            f"data.cameras loads {', '.join(idle)}, and the model does not look through it: it reads "
            f"{', '.join(sorted(read))} (processor.cameras)"
        )
    if not getattr(datamodule, "proprio", True):
        stated = [name for name, source in datamodule.sources.items() if any(source.spec.state)]
        if stated:
            log.info(f"{', '.join(stated)}: the model does not read the states (with data.proprio=true it does)")


def say_devices(cfg: DictConfig) -> None:
    """Warn of more CPU processes than cores; with several processes, only the first one logs."""
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
        return
    devices, on_cpu = cfg.trainer.get("devices"), not torch.cuda.is_available()
    cores = available_cores()
    if on_cpu and isinstance(devices, int) and devices > cores:
        log.warning(
            f"trainer.devices={devices}: so many processes share {cores} CPU cores and take turns; "
            f"trainer.devices={cores} is as fast, and data.global_batch_size stays what it is"
        )


def check_all(**checks: Callable[[], None]) -> None:
    """Run all `checks` by name, and raise one ConfigError with all their errors."""
    problems = []
    for what, check in checks.items():
        try:
            check()
        except (OSError, ValueError) as error:
            problems.append(f"{what}: {error}")
    if problems:
        raise ConfigError("\n\n  ".join(["this run cannot start:", *problems]))


def find_data(cfg: DictConfig, datamodule: Any) -> None:
    """Make missing datasets of the embedded world; raise MissingDataError for others."""
    if (missing := datamodule.missing()) and "://" not in str(cfg.paths.data_dir):
        make_embedded(missing, Path(cfg.paths.data_dir))
    datamodule.check()


def make_embedded(missing: Sequence[str], data_dir: Path) -> None:
    """Make the missing datasets that belong to the embedded world."""
    from openvla_lightning import demonstrations  # imports the simulator

    if names := [name for name in missing if name in demonstrations.DATASETS]:
        log.info(f"Making demonstrations that are not in {data_dir} yet: {', '.join(names)}")
        demonstrations.make(data_dir, names)


def open_mixture(cfg: DictConfig) -> Any:
    """The DataModule of `cfg`, prepared and set up, for commands that use data without training.

    Raises:
        ConfigError: something is wrong or missing; the message names it.
    """
    validate(cfg)
    cfg.data.curriculum = None  # use the shares at the start of training
    datamodule = instantiate(cfg.data, collate=list, _convert_="all")
    check_all(data=lambda: find_data(cfg, datamodule))
    with blaming_config():
        datamodule.prepare_data()
        datamodule.setup()
    return datamodule


@for_people(ConfigError)
def data_report(cfg: DictConfig) -> None:
    """Write a report on the datasets of `cfg` into the run's folder.

    Raises:
        ConfigError: something is wrong or missing; the message names it.
    """
    from openvla_lightning.data.report.facts import selections
    from openvla_lightning.data.report.pages import write_report

    datamodule = open_mixture(cfg)
    with blaming_config():  # a damaged file may be found only here
        title = f"Data: {Path(cfg.run_name).name}, no-op filter {datamodule.noop_filter}"
        path = write_report(selections(datamodule), Path(cfg.paths.output_dir), title)
    log.info(f"Written to {path.parent}: report.md, report.html")
