"""Weights & Biases: one run per folder, offline without an account."""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from openvla_lightning.report.sweeps import FILE_NAME as COSTS
from openvla_lightning.report.sweeps import RUNS_OWN

TAGGED = ("model", "strategy", "data/mix", "env")
"""Groups whose choice becomes a tag."""
SPEED = re.compile(r"^train/(?=(samples_per_second|step_seconds|data_wait|mfu|peak_memory_gb)\b)")
"""Metrics of `callbacks.Throughput`, which get a separate section: W&B makes a section of each first word."""
LONGEST_NAME = 128
"""Longest name in W&B, in characters."""


class WandbLogger(LightningWandbLogger):
    """Lightning's WandbLogger for a run's folder. If it holds a killed run, logging continues under that run's id.

    Without an API key, it writes offline, and `wandb sync` uploads the run later; so no run waits for a login or loses
    its dashboard. The environment variable WANDB_MODE overrides this. Config columns are the resolved config, `choices`
    (the option of each group) and `overrides` (from the command line).

    Args:
        save_dir: the run's folder.
        project: W&B project.
        group: common name of runs that are compared.
        entity: user or team; None: the default of the logged-in user.
        tags: tags besides the chosen model, strategy, mixture and environment.
        artifacts: upload checkpoints and dataset statistics as artifacts: each checkpoint when it is saved, or at the
            end if old ones are deleted during the run.
    """

    def __init__(
        self,
        save_dir: str,
        project: str,
        group: str,
        entity: str | None = None,
        tags: Sequence[str] = (),
        artifacts: bool = False,
    ) -> None:
        import wandb

        self.folder, self.artifacts = Path(save_dir), artifacts
        self.choices, self.overrides, script = started_with(self.folder)
        varied = [text for text in self.overrides if not text.startswith((*RUNS_OWN, "ckpt_path=", "logger"))]
        logged_in = wandb.login(prompt=False, verify=False)
        super().__init__(
            save_dir=save_dir,
            project=project,
            group=group,
            entity=entity,
            id=begun_in(self.folder),
            name=(" ".join(varied) or self.folder.name)[:LONGEST_NAME],
            job_type=script,
            mode=None if logged_in or "WANDB_MODE" in os.environ else "offline",
        )
        del self._wandb_init["anonymous"]  # W&B has removed this argument
        self.tags = tags
        self._tag()
        self._started = time.time()
        self._kept: set[Path] = set()

    def about(self, trained: Path, name: str) -> None:
        """Declare, before the run begins, that it evaluates the training in the folder `trained`.

        The run gets the training's group, choices and overrides, so that its numbers can be compared.
        """
        self._wandb_init |= {"name": name[:LONGEST_NAME], "job_type": "evaluate"}
        choices, overrides, _ = started_with(trained)
        self.choices, self.overrides = {**choices, **self.choices}, overrides or self.overrides
        self._tag()
        config = trained / ".hydra" / "config.yaml"
        if config.is_file() and isinstance(
            group := yaml.safe_load(config.read_text(encoding="utf-8")).get("run_name"), str
        ):
            self._wandb_init["group"] = group

    def _tag(self) -> None:
        chosen = [self.choices[name] for name in TAGGED if name in self.choices]
        self._wandb_init["tags"] = list(dict.fromkeys([*chosen, *self.tags]))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """As in Lightning, plus the choices of the config."""
        super().log_hyperparams({**params, "choices": self.choices, "overrides": self.overrides})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As in Lightning, with the speed of training under `throughput/`."""
        super().log_metrics({SPEED.sub("throughput/", name): value for name, value in metrics.items()}, step)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Upload new checkpoints, if requested and none will be deleted before its upload."""
        if checkpoint_callback.save_top_k == -1:
            self._keep("checkpoint", (path for path in self._checkpoints() if path.is_file()))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Add the run's costs, upload the artifacts, and end the run, because the next one of a sweep is separate."""
        if self._experiment is None:
            return
        if (self.folder / COSTS).is_file():
            costs = json.loads((self.folder / COSTS).read_text(encoding="utf-8"))
            self._experiment.summary.update({f"costs/{name}": value for name, value in costs.items()})
        if status == "success":
            self._keep("checkpoint", self._checkpoints())
            self._keep("dataset_statistics", self.folder.glob("dataset_statistics.json"))
        self._experiment.finish(exit_code=0 if status == "success" else 1)
        self._id = self._wandb_init["id"] = self._experiment.id
        self._experiment = None

    def _checkpoints(self) -> list[Path]:
        """The checkpoints of this attempt, oldest first; incomplete ones have another name."""
        paths = [path for path in self.folder.glob("checkpoints/*.ckpt") if not path.is_symlink()]
        return sorted(path for path in paths if path.stat().st_mtime >= self._started)

    def _keep(self, artifact_type: str, paths: Iterable[Path]) -> None:
        import wandb

        for path in paths if self.artifacts else ():
            if path not in self._kept:
                artifact = wandb.Artifact(
                    f"{artifact_type}-{self.experiment.id}", type=artifact_type, metadata={"path": str(path)}
                )
                add: Any = artifact.add_dir if path.is_dir() else artifact.add_file
                add(str(path), policy="immutable")  # uploaded in place, without a copy in a cache
                self.experiment.log_artifact(artifact, aliases=["latest", path.stem])
                self._kept.add(path)


def started_with(folder: Path) -> tuple[dict[str, str], list[str], str | None]:
    """Hydra's records in a run's folder: option by group, overrides, name of the script."""
    file = folder / ".hydra" / "hydra.yaml"
    if not file.is_file():
        return {}, [], None
    hydra = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]
    choices = {
        group: option
        for group, option in hydra["runtime"]["choices"].items()
        if option is not None and not group.startswith("hydra")
    }
    return choices, list(hydra["overrides"]["task"]), hydra["job"]["name"]


def begun_in(folder: Path) -> str | None:
    """Id of the W&B run that was started in a run's folder, if there is one."""
    attempts = (path.name for path in folder.glob("wandb/*run-*-*"))  # run-<time>-<id>, offline-run-<time>-<id>
    newest = max(attempts, key=lambda name: name.removeprefix("offline-"), default=None)
    return None if newest is None else newest.rpartition("-")[2]
