"""Checkpoints of train.py and finetune.py: whole models, or adapters that name their base."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.checkpoint.api import CheckpointException

from openvla_lightning.checkpoint.format import Base, CheckpointError, Description, Shapes
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.checkpoint.sharded import ABOUT, is_sharded, read_about, read_shapes, read_weights
from openvla_lightning.checkpoint.tensors import modern_name, read_pickle, shapes_of
from openvla_lightning.model.vla import VLA


class Training:
    """A `.ckpt` of training (a sharded one is a folder), or a folder of runs, which means the newest one below it."""

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a `.ckpt` or holds runs."""
        if path.suffix == ".ckpt":
            return True
        return path.is_dir() and newest_checkpoint(path) is not None

    def describe(self, path: Path) -> Description:
        """The description that training stored with the weights.

        Raises:
            CheckpointError: for a damaged or incomplete checkpoint, or one of another program.
        """
        file = path if path.suffix == ".ckpt" else newest_checkpoint(path) or path
        content = contents(file, weights=False)
        about = content["openvla_lightning"]
        method = about.get("normalisation", "quantile")
        return Description(
            path=file,
            format=self,
            files=(file,),
            shapes=_shapes(file, content["state_dict"]),
            norm_stats={name: {"normalisation": method, **stats} for name, stats in about["norm_stats"].items()},
            vla=about["vla"],
            processor=dict(about["processor"]),
            strategy=about.get("strategy"),
            base=_base(file, about),
            quantisation=about.get("quantisation"),
            recipe=dict(content.get("hyper_parameters") or {}),
        )

    def tensors(self, description: Description) -> Iterator[dict[str, Tensor]]:
        """All tensors at once: memory-mapped from a single file, or joined from shards."""
        for path in description.files:
            state = _of_the_vla(contents(path)["state_dict"])
            yield {modern_name(name): tensor for name, tensor in state.items()}


def _of_the_vla(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("vla."): v for k, v in state.items() if k.startswith("vla.")}


def contents(path: Path, weights: bool = True) -> dict[str, Any]:
    """The contents of a training checkpoint; without `weights`, the tensors of a sharded one are not read.

    Raises:
        CheckpointError: when another program wrote it, or it is incomplete.
    """
    if path.is_dir() and not is_sharded(path):
        raise CheckpointError(path, [f"there is no {ABOUT}: this sharded checkpoint was never finished"])
    content = _read_shards(path, weights) if path.is_dir() else read_pickle(path)
    about = content.get("openvla_lightning")
    if not isinstance(about, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(path, ["is not a checkpoint that train.py or finetune.py wrote"])
    missing = [key for key in ("vla", "processor", "norm_stats") if not isinstance(about.get(key), dict)]
    if missing:
        raise CheckpointError(path, [f"the checkpoint does not describe its {name}" for name in missing])
    return content


def _shapes(path: Path, state: Mapping[str, Tensor]) -> Shapes:
    if not path.is_dir():
        return shapes_of(_of_the_vla(state).items())
    with _reading_shards(path):
        return {k.removeprefix("vla."): shape for k, shape in read_shapes(path).items() if k.startswith("vla.")}


def _read_shards(path: Path, weights: bool) -> dict[str, Any]:
    with _reading_shards(path):
        return {**read_about(path), "state_dict": read_weights(path) if weights else {}}


@contextmanager
def _reading_shards(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # a folder from outside can be wrong in any way
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            path, [f"the sharded checkpoint is damaged, or of a newer torch (nothing was run): {reason[0][:300]}"]
        ) from error


def _base(path: Path, about: Mapping[str, Any]) -> Base | None:
    base = about.get("base")
    if base is None:
        return None
    if not isinstance(base, Mapping) or not all(isinstance(base.get(key), str) for key in ("path", "sha256")):
        raise CheckpointError(path, ["its `base` must say `path` and `sha256`"])
    return Base(base["path"], base["sha256"])


def learnt_names(vla: VLA) -> set[str]:
    """Names in the `state_dict` of everything that training changes: parameters that learn, and buffers."""
    learning = {name for name, parameter in vla.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    learning = {name.replace(_CHECKPOINT_PREFIX, "") for name in learning}  # with activation checkpointing
    return (learning | {name for name, _ in vla.named_buffers()}) & set(vla.state_dict())


def check_adapter(checkpoint: Mapping[str, Any], base: Base | None, vla: VLA) -> None:
    """Before a run resumes, check that the adapter in `checkpoint` is complete and belongs to `base`.

    Raises:
        CheckpointError: when it is not. A checkpoint with all weights is not checked.
    """
    recorded = checkpoint["openvla_lightning"].get("base")
    if recorded is None:
        return
    if base is None or base.sha256 != recorded["sha256"]:
        on = "random weights" if base is None else f"{base.path} (sha256 {str(base.sha256)[:12]})"
        problem = f"this run stands on {on}, the adapter on {recorded['path']} (sha256 {recorded['sha256'][:12]})"
        raise CheckpointError("the adapter", [problem])
    if lacking := {f"vla.{name}" for name in learnt_names(vla)} - set(checkpoint["state_dict"]):
        raise CheckpointError("the adapter", [f"{key}: missing" for key in sorted(lacking)])
