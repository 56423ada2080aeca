"""The list of checkpoint formats, and the description of a checkpoint of any format."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from openvla_lightning.checkpoint.cogact import CogACT
from openvla_lightning.checkpoint.format import Base, CheckpointError, Description, Format
from openvla_lightning.checkpoint.oft import OFT
from openvla_lightning.checkpoint.peft_folder import PeftFolder
from openvla_lightning.checkpoint.prismatic import Prismatic
from openvla_lightning.checkpoint.released import Released
from openvla_lightning.checkpoint.training import Training
from openvla_lightning.model.hub import check_source

FORMATS: tuple[Format, ...] = (CogACT(), Prismatic(), OFT(), Released(), PeftFolder(), Training())
"""All supported formats; the first one that recognises a path reads it."""

_DOWNLOAD = ("*.json", "*.safetensors", "*.model", "*.txt", "*--*_checkpoint.pt", "adapter_model.bin")


def describe(path: str | Path | Description) -> Description:
    """The description of the checkpoint at `path`; a hub id is downloaded unless it is in the cache.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
        CheckpointError: when it cannot be read.
    """
    if isinstance(path, Description):
        return path
    check_source(path)
    place = Path(path).expanduser()
    if not place.exists():
        place = Path(snapshot_download(str(path), allow_patterns=list(_DOWNLOAD)))
    for format in FORMATS:
        if format.recognises(place):
            return format.describe(place)
    if place.is_file():
        raise CheckpointError(place, ["expected a folder, a .ckpt written here or a Prismatic .pt"])
    inside = sorted(p.name for p in place.iterdir())
    loose = next((f": name the file, {place / name}" for name in reversed(inside) if name.endswith(".ckpt")), "")
    expected = "there is neither a checkpoint of training in checkpoints/ nor a config.json of a released model"
    raise CheckpointError(place, [f"{expected}; the folder holds {', '.join(inside[:8]) or 'nothing'}{loose}"])


def base_at(path: str | Path) -> Base:
    """The checkpoint at `path` as the base of an adapter; its path is made absolute if it is on this disk."""
    local = Path(path).expanduser()
    return Base(str(local.resolve()) if local.exists() else str(path), weights_hash(path))


def check_base(base: Base, path: str | Path, needed_by: Path) -> None:
    """Make sure that `path` holds `base`.

    Raises:
        CheckpointError: when `path` does not exist, or holds a model with other weights.
    """
    hint = "give the one it was trained on as base=... (policy.base=... on the command line, --base for export)"
    try:
        check_source(path)
    except FileNotFoundError as error:
        raise CheckpointError(needed_by, [f"it is an adapter and its base is gone: {error}", hint]) from error
    if base.sha256 is not None and (sha256 := weights_hash(path)) != base.sha256:
        problem = f"it is an adapter for other weights than those of {path}"
        raise CheckpointError(needed_by, [f"{problem}: sha256 {sha256[:12]}, needed {base.sha256[:12]}", hint])


def with_base(description: Description, base: str | Path | None = None) -> Description:
    """`description`, completed from the adapter's base if it does not say the architecture itself.

    peft's folders, also within those of OpenVLA-OFT, hold an adapter and nothing about the model around it.

    Args:
        description: of any checkpoint.
        base: present location of the adapter's base; None: its location during training.

    Raises:
        CheckpointError: the base is gone, or cannot be read.
    """
    if description.base is None or description.vla.get("llm"):
        return description
    place = description.base.path if base is None else base
    check_base(description.base, place, description.path)
    under = describe(place).check()
    return replace(
        description,
        vla={**under.vla, **description.vla},
        processor={**under.processor, **description.processor},
        json_files=under.json_files,
    )


def weights_hash(path: str | Path) -> str:
    """sha256 over names, dtypes, shapes and values of a checkpoint's tensors, for any distribution over files.

    An adapter's hash covers only the adapter, because the adapter names its own base.
    """
    description = describe(path)
    state = {name: tensor for part in description.format.tensors(description) for name, tensor in part.items()}
    tensors = sorted(state.items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, (tensor for _, tensor in tensors)))
    lines = (f"{name} {digest}\n" for (name, _), digest in zip(tensors, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    values = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    values.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return values.hexdigest()
