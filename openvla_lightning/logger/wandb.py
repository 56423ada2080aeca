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
"""Of what `callbacks.Throughput` logs: W&B makes a section of each first word, and these have their own."""
LONGEST_NAME = 128
"""Characters that W&B takes."""


class WandbLogger(LightningWandbLogger):
    """Lightning's WandbLogger for a run's folder. If it holds a killed run, logging continues under that run's id.

    Without an API key it writes offline, so that no run waits for one or loses its dashboard; `wandb sync` uploads it
    later. The environment variable WANDB_MODE has the last word. Config columns are the resolved config, `choices`
    (which option of each group) and `overrides` (what was typed).

    Args:
        save_dir: the run's folder.
        project: W&B project.
        group: name that runs to be seen side by side share.
        entity: user or team; None: the default of whoever is logged in.
        tags: added to the chosen model, strategy, mixture and environment.
        artifacts: keep checkpoints and dataset statistics as artifacts: each checkpoint once it is saved, or at the end
            when old ones are deleted on the way.
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
        del self._wandb_init["anonymous"]  # W&B no longer knows it
        self.tags = tags
        self._tag()
        self._started = time.time()
        self._kept: set[Path] = set()

    def about(self, trained: Path, name: str) -> None:
        """Say, before the run begins, that it evaluates what was trained in the folder `trained`.

        It takes over group, choices and overrides, so that its numbers stand beside those of the training.
        """
        self._wandb_init |= {"name": name[:LONGEST_NAME], "job_type": "evaluate"}
        choices, overrides, _ = started_with(trained)
        self.choices, self.overrides = {**choices, **self.choices}, overrides or self.overrides
        self._tag()
        config = trained / ".hydra" / "config.yaml"
        if config.is_file() and isinstance(group := yaml.safe_load(config.read_text()).get("run_name"), str):
            self._wandb_init["group"] = group

    def _tag(self) -> None:
        chosen = [self.choices[name] for name in TAGGED if name in self.choices]
        self._wandb_init["tags"] = list(dict.fromkeys([*chosen, *self.tags]))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """As in Lightning, and the choices behind it."""
        super().log_hyperparams({**params, "choices": self.choices, "overrides": self.overrides})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As in Lightning, with the speed of training under `throughput/`."""
        super().log_metrics({SPEED.sub("throughput/", name): value for name, value in metrics.items()}, step)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Keep new checkpoints, if asked and none will be deleted before it is uploaded."""
        if checkpoint_callback.save_top_k == -1:
            self._keep("checkpoint", (path for path in self._checkpoints() if path.is_file()))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Add what the run cost, keep what was asked for, and end the run: the next one of a sweep has its own."""
        if self._experiment is None:
            return
        if (self.folder / COSTS).is_file():
            costs = json.loads((self.folder / COSTS).read_text())
            self._experiment.summary.update({f"costs/{name}": value for name, value in costs.items()})
        if status == "success":
            self._keep("checkpoint", self._checkpoints())
            self._keep("dataset_statistics", self.folder.glob("dataset_statistics.json"))
        self._experiment.finish(exit_code=0 if status == "success" else 1)
        self._id = self._wandb_init["id"] = self._experiment.id
        self._experiment = None

    def _checkpoints(self) -> list[Path]:
        """Those of this attempt, oldest first; what is still being written has another name."""
        found = [path for path in self.folder.glob("checkpoints/*.ckpt") if not path.is_symlink()]
        return sorted(path for path in found if path.stat().st_mtime >= self._started)

    def _keep(self, kind: str, paths: Iterable[Path]) -> None:
        import wandb

        for path in paths if self.artifacts else ():
            if path not in self._kept:
                artifact = wandb.Artifact(f"{kind}-{self.experiment.id}", type=kind, metadata={"path": str(path)})
                add: Any = artifact.add_dir if path.is_dir() else artifact.add_file
                add(str(path), policy="immutable")  # read from where it lies: no copy of a model in a cache
                self.experiment.log_artifact(artifact, aliases=["latest", path.stem])
                self._kept.add(path)


def started_with(folder: Path) -> tuple[dict[str, str], list[str], str | None]:
    """What Hydra wrote into a run's folder: option by group, overrides, name of the script."""
    file = folder / ".hydra" / "hydra.yaml"
    if not file.is_file():
        return {}, [], None
    hydra = yaml.safe_load(file.read_text())["hydra"]
    choices = {
        group: option
        for group, option in hydra["runtime"]["choices"].items()
        if option is not None and not group.startswith("hydra")
    }
    return choices, list(hydra["overrides"]["task"]), hydra["job"]["name"]


def begun_in(folder: Path) -> str | None:
    """Id of the W&B run that was begun in a run's folder, if there is one."""
    attempts = (path.name for path in folder.glob("wandb/*run-*-*"))  # run-<time>-<id>, offline-run-<time>-<id>
    newest = max(attempts, key=lambda name: name.removeprefix("offline-"), default=None)
    return None if newest is None else newest.rpartition("-")[2]
