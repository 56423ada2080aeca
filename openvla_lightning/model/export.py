"""From what training wrote to a folder in the released layout: merged once, on the CPU, a layer at a time."""

import os
import shutil
from collections import Counter
from pathlib import Path

import torch

from openvla_lightning.model.checkpoint import load_vla
from openvla_lightning.model.vla import VLA
from openvla_lightning.processor import Processor


def export(
    source: str | Path,
    folder: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> Path:
    """Write the model of `source` in the released layout; an adapter is merged into its base on the way.

    Weights stay on disk until they are written, so memory holds a shard. Killed in between, it leaves what was at
    `folder` before, or nothing there: never a part of a model.

    Args:
        source: a run or checkpoint of ours, or anything else that `VLA.from_pretrained` loads.
        folder: to be made.
        base: where an adapter's base is now; None: where it was during training.
        dtype: of the weights written; None: the base's.
        overwrite: replace what is at `folder`, all of it.
        max_shard_size: bytes of weights per file.

    Returns:
        `folder`.

    Raises:
        CheckpointError: for a source that does not fit, all problems at once.
        FileExistsError: when `folder` exists and `overwrite` was not asked for.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder, or replace it with --overwrite")
    processor = Processor.from_pretrained(source)
    vla = load_vla(source, guard=False, merge=False, base=base, copy=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    vla.save_pretrained(unfinished, processor, max_shard_size, dtype or stored_dtype(vla))
    _swap(unfinished, folder)
    return folder


def stored_dtype(vla: VLA) -> torch.dtype:
    """The dtype most of the frozen or whole model's values are kept in."""
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in vla.named_parameters():
        if ".lora_" not in name:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _swap(unfinished: Path, folder: Path) -> None:
    """Put `unfinished` in the place of `folder`; a folder that is not empty cannot be replaced in one step."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what exports of `folder` that were killed have left."""
    for state in ("unfinished", "old"):
        for left in folder.parent.glob(f".{folder.name}.*.{state}"):
            pid = left.name.split(".")[-2]
            if not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left)
