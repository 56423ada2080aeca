"""Checkpoints that train.py and finetune.py write: whole models, or adapters that name the model they belong to."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.checkpoint.api import CheckpointException

from openvla_lightning.model.filling import check_fits, fill
from openvla_lightning.model.sharded import read_about, read_weights
from openvla_lightning.model.source import (
    CheckpointError,
    Source,
    check_source,
    find_source,
    modern_name,
    read_pickle,
    read_tensors,
)
from openvla_lightning.model.vla import VLA


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model that an adapter belongs to.

    Attributes:
        path: folder, file or hub id it was loaded from.
        sha256: of its weights; the same for every layout of the same numbers (see `weights_hash`).
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> Self:
        """Describe what is at `path`, an absolute path if it is on this disk."""
        local = Path(path).expanduser()
        return cls(str(local.resolve()) if local.exists() else str(path), weights_hash(path))

    def check(self, path: str | Path, needed_by: str | Path) -> None:
        """Make sure that `path` holds this base.

        Raises:
            CheckpointError: when there is nothing, or a model with other weights.
        """
        hint = "give the one it was trained on as base=... (policy.base=... on the command line, --base for export)"
        try:
            check_source(path)
        except FileNotFoundError as error:
            raise CheckpointError(needed_by, [f"it is an adapter and its base is gone: {error}", hint]) from error
        if (found := weights_hash(path)) != self.sha256:
            problem = f"it is an adapter for other weights than those of {path}"
            raise CheckpointError(needed_by, [f"{problem}: sha256 {found[:12]}, needed {self.sha256[:12]}", hint])


def weights_hash(path: str | Path) -> str:
    """sha256 over names, dtypes, shapes and values of a checkpoint's tensors, however they are spread over files.

    An adapter's hash covers the adapter alone: it names its own base.
    """
    tensors = sorted(read_state(find_source(path)).items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, (tensor for _, tensor in tensors)))
    lines = (f"{name} {digest}\n" for (name, _), digest in zip(tensors, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    values = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    values.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return values.hexdigest()


def read_state(source: Source) -> dict[str, Tensor]:
    """All tensors under the names a VLA gives them; they stay on disk until they are used."""
    if source.kind == "lightning":
        return _own(contents(source)["state_dict"])
    return {modern_name(name): tensor for tensors in read_tensors(source) for name, tensor in tensors.items()}


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("vla."): v for k, v in state.items() if k.startswith("vla.")}


def contents(source: Source, weights: bool = True) -> dict[str, Any]:
    """What our checkpoint says of itself, and its tensors; without `weights` those of a sharded one are not read.

    Raises:
        CheckpointError: when it was written by something else.
    """
    content = _read_shards(source.path, weights) if source.path.is_dir() else read_pickle(source.path)
    about = content.get("openvla_lightning")
    if not isinstance(about, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(source.path, ["is not a checkpoint that train.py or finetune.py wrote"])
    missing = [key for key in ("vla", "processor", "norm_stats") if not isinstance(about.get(key), dict)]
    if missing:
        raise CheckpointError(source.path, [f"the checkpoint does not describe its {name}" for name in missing])
    return content


def _read_shards(path: Path, weights: bool) -> dict[str, Any]:
    try:
        return {**read_about(path), "state_dict": read_weights(path) if weights else {}}
    except (Exception, CheckpointException) as error:  # a folder from outside can be wrong in any way
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            path, [f"the sharded checkpoint is damaged (nothing was run): {reason[0][:300]}"]
        ) from error


def base_of(source: Source) -> Base | None:
    """The base of an adapter's checkpoint; None for one that holds all weights."""
    if source.kind != "lightning":
        return None
    base = contents(source, weights=False)["openvla_lightning"].get("base")
    if base is None:
        return None
    if not isinstance(base, Mapping) or not all(isinstance(base.get(key), str) for key in ("path", "sha256")):
        raise CheckpointError(source.path, ["its `base` must say `path` and `sha256`"])
    return Base(base["path"], base["sha256"])


def learnt_names(vla: VLA) -> set[str]:
    """Names in the `state_dict` of what training changes: parameters that learn, and buffers."""
    learning = {name for name, parameter in vla.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    learning = {name.replace(_CHECKPOINT_PREFIX, "") for name in learning}  # where activations are recomputed
    return (learning | {name for name, _ in vla.named_buffers()}) & set(vla.state_dict())


def check_adapter(checkpoint: Mapping[str, Any], base: Base | None, vla: VLA) -> None:
    """Before a run goes on from the adapter in `checkpoint`: is it whole, and does it fit on `base`?

    Raises:
        CheckpointError: when not; nothing is asked of a checkpoint that holds all weights.
    """
    recorded = checkpoint["openvla_lightning"].get("base")
    if recorded is None:
        return
    if base is None or base.sha256 != recorded["sha256"]:
        on = "random weights" if base is None else f"{base.path} (sha256 {base.sha256[:12]})"
        problem = f"this run stands on {on}, the adapter on {recorded['path']} (sha256 {recorded['sha256'][:12]})"
        raise CheckpointError("the adapter", [problem])
    if lacking := {f"vla.{name}" for name in learnt_names(vla)} - set(checkpoint["state_dict"]):
        raise CheckpointError("the adapter", [f"{key}: missing" for key in sorted(lacking)])


def load_lightning(
    source: Source,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    merge: bool = True,
    base: str | Path | None = None,
    copy: bool = True,
) -> VLA:
    """Load our checkpoint, an adapter's together with its base.

    Args:
        source: the file.
        dtype: of the parameters, adapters that stay unmerged excepted; None keeps what the files hold.
        device: where they go.
        merge: fold LoRA adapters into the layers they adapt.
        base: where an adapter's base is now, when it has moved.
        copy: False leaves on disk what needs no cast, until it is used.

    Raises:
        CheckpointError: for anything that does not fit, the wrong base included.
    """
    from openvla_lightning.model.checkpoint import load_weights
    from openvla_lightning.strategy import LoRA, from_config
    from openvla_lightning.strategy.lora import merge as merge_adapters

    content, recorded = contents(source), base_of(source)
    about, state = content["openvla_lightning"], _own(content["state_dict"])
    if recorded is not None:
        base = recorded.path if base is None else base
        recorded.check(base, source.path)
    try:
        strategy = from_config(about["strategy"]) if about.get("strategy") else None
        with torch.device("meta"):
            vla = VLA.from_config(about["vla"])
        if recorded is not None:
            load_weights(vla, str(base), dtype=dtype, device=device, copy=copy)
        if isinstance(strategy, LoRA):
            with torch.device("meta"):
                strategy.inject(vla)
    except CheckpointError:
        raise
    except Exception as error:  # a file from outside can be wrong in any way
        raise CheckpointError(source.path, [f"its model cannot be built: {type(error).__name__}: {error}"]) from error
    found = {k: (tuple(v.shape), v.dtype) for k, v in state.items()}
    if recorded is not None:
        learnt = learnt_names(vla)
        found |= {k: (tuple(v.shape), v.dtype) for k, v in vla.state_dict().items() if k not in learnt}
    check_fits(source, vla, found, None)
    adapters = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    fill(source, vla, {name: tensor for name, tensor in state.items() if name not in adapters}, dtype, device, copy)
    fill(source, vla, adapters, None, device, copy)
    vla.language_model.tie_weights()
    vla.to(device)
    if isinstance(strategy, LoRA) and merge:
        merge_adapters(vla)
        vla.requires_grad_(True)
    method = about.get("normalisation", "quantile")
    vla.norm_stats = {name: {"normalisation": method, **stats} for name, stats in about["norm_stats"].items()}
    vla.recipe = dict(content.get("hyper_parameters") or {})
    return vla
