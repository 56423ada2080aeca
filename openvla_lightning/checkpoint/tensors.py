"""Loading of tensors from untrusted files into a model, with errors that name everything that does not fit."""

import logging
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openvla_lightning.checkpoint.format import CheckpointError, Description, Shapes, refuse_pointer
from openvla_lightning.model.vla import VLA

log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def open_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a .safetensors file or of a pickled dictionary; they stay on disk until they are used.

    Raises:
        CheckpointError: for a truncated file, or one that would run code.
    """
    refuse_pointer(path)
    if path.suffix != ".safetensors":
        content = read_pickle(path)
        if strangers := [name for name, value in content.items() if not isinstance(value, Tensor)]:
            raise CheckpointError(path, [f"{path.name} holds {name!r}, which is no tensor" for name in strangers])
        yield from content.items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(path, [f"{path.name} is truncated or no safetensors file: {error}"]) from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The contents of a file saved by torch. Only tensors and plain types are unpickled; tensors stay on disk until
    used.

    Raises:
        CheckpointError: for any other file, such as a truncated one or one that would run code.
    """
    refuse_pointer(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        problem = f"{path.name} is damaged, or holds more than tensors and plain values (nothing was run): {reason}"
        raise CheckpointError(path, [problem]) from error
    if not isinstance(content, dict):
        raise CheckpointError(path, [f"{path.name} must hold a dictionary, holds a {type(content).__name__}"])
    return content


def holds_text(path: Path, text: str) -> bool:
    """Whether `text` is among the keys and values of a file saved by torch, found without unpickling."""
    wanted = b"X" + struct.pack("<I", len(text)) + text.encode()  # a short string in torch's pickle protocol 2
    try:
        with zipfile.ZipFile(path) as archive:
            return any(wanted in archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    except (OSError, zipfile.BadZipFile):
        return False  # whoever reads it says so


def shapes_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor, under its name in a VLA."""
    return {modern_name(name): (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}


def modern_name(key: str) -> str:
    """`key` with the released name of LayerScale, for files from any version of timm."""
    if key.startswith("vision_backbone.") and key.endswith((".ls1.gamma", ".ls2.gamma")):
        return key.removesuffix("gamma") + "scale_factor"
    return key


def check_fits(description: Description, vla: VLA, available: Shapes | None = None) -> None:
    """Compare a checkpoint's tensors with those of the model, by name, shape and dtype.

    Args:
        description: description of the checkpoint.
        vla: the model.
        available: shapes of all available tensors, if the checkpoint does not hold all; None: its own shapes.

    Raises:
        CheckpointError: they differ; it lists all differences.
    """
    available = description.shapes if available is None else available
    wanted = {k: tuple(v.shape) for k, v in vla.state_dict().items()}
    optional = {"language_model.lm_head.weight"} if vla.language_model.tied else set()
    problems = [
        f"{key}: missing, should be {list(wanted[key])}" for key in wanted if key not in {*available, *optional}
    ]
    problems += [f"{key}: the model has no such parameter" for key in available if key not in wanted]
    one_dtype, stated = description.one_dtype
    if one_dtype and optional & set(available):
        problems.append("language_model.lm_head.weight: the config ties it to the embedding, the file holds another")
    for key, (shape, _) in available.items():
        if key in wanted and shape != wanted[key]:
            problems.append(f"{key}: is {list(shape)}, should be {list(wanted[key])}")
    if one_dtype:
        floats = {k for k, v in vla.state_dict().items() if v.is_floating_point()}
        dtypes = {k: dtype for k, (_, dtype) in available.items() if k in floats}
        problems += dtype_problems(dtypes)
        if not problems:
            _say_dtypes(description.path, dtypes, stated)
    if problems:
        raise CheckpointError(description.path, problems)


def dtype_problems(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Problems of weights whose dtype is not valid for weights."""
    return [
        f"{key}: is {dtype}; expected float32, bfloat16 or float16"
        for key, dtype in dtypes.items()
        if dtype not in _FLOATS
    ]


def usual_dtype(shapes: Shapes) -> torch.dtype:
    """The dtype of most floating weights, which is the default for loading a checkpoint."""
    floats = Counter(dtype for _, dtype in shapes.values() if dtype in _FLOATS)
    return floats.most_common(1)[0][0] if floats else torch.float32


def _say_dtypes(path: Path, dtypes: Mapping[str, torch.dtype], stated: torch.dtype | None) -> None:
    """Warn of weights that were saved again in another dtype: they are cast, which may lose precision."""
    if not dtypes:
        return
    usual, count = Counter(dtypes.values()).most_common(1)[0]
    if others := [f"{key} ({dtype})" for key, dtype in dtypes.items() if dtype != usual]:
        shown = ", ".join(others[:3])
        log.warning(f"{path}: {count:,} weights are {usual}, {len(others):,} are not ({shown}): all are cast alike")
    if stated is not None and stated != usual:
        log.warning(
            f"{path}: config.json says torch_dtype {stated}, the weights are {usual}: they are taken as they are"
        )


def with_added(vla: VLA, shapes: Shapes) -> Shapes:
    """`shapes`, plus those of added parts that are entirely missing there."""
    names = {parameter: name for name, parameter in vla.named_parameters()}
    for part in vla.added():
        part_shapes = {names[parameter]: (tuple(parameter.shape), parameter.dtype) for parameter in part.parameters()}
        if not part_shapes.keys() & shapes.keys():
            shapes = {**shapes, **part_shapes}
    return shapes


def begin_added(vla: VLA) -> None:
    """Give random weights to added parts that are still on the meta device, such as FiLM's."""
    for part in vla.added():
        for module in part.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()  # type: ignore[operator]


def fill(
    path: str | Path,
    vla: VLA,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    copy: bool = True,
) -> None:
    """Copy `tensors` into the model, cast to `dtype` and moved to `device`; None for both: as in the model.

    Without `copy`, a tensor that needs neither is used where it is: on disk, if its file is memory-mapped.

    Raises:
        CheckpointError: some values are not finite; it names `path`.
    """
    state = vla.state_dict()
    placed, broken = {}, []
    for key, tensor in tensors.items():
        there = state[key]
        if device is None:
            on_meta = there.device.type == "meta"
            place, target_dtype = ("cpu", torch.get_default_dtype()) if on_meta else (there.device, there.dtype)
        else:
            place, target_dtype = device, dtype or tensor.dtype
        if tensor.is_floating_point():
            if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
                broken.append(f"{key}: holds values that are not finite")
            placed[key] = tensor.to(place, target_dtype, copy=copy)
        else:
            placed[key] = tensor.to(place, copy=copy)
    if broken:
        raise CheckpointError(path, broken)
    vla.load_state_dict(placed, strict=False, assign=True)
