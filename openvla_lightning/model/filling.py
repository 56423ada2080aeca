"""Tensors from a file into a model: what fits is copied, what does not is named."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from openvla_lightning.model.source import CheckpointError, Source, modern_name
from openvla_lightning.model.vla import VLA

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_fits(source: Source, vla: VLA, found: Shapes, stated: torch.dtype | None) -> None:
    """Compare what the files hold with what the model needs, by name, shape and dtype.

    Raises:
        CheckpointError: listing every difference.
    """
    wanted = {k: tuple(v.shape) for k, v in vla.state_dict().items()}
    optional = {"language_model.lm_head.weight"} if vla.language_model.tied else set()
    problems = [f"{key}: missing, should be {list(wanted[key])}" for key in wanted if key not in {*found, *optional}]
    problems += [f"{key}: the model has no such parameter" for key in found if key not in wanted]
    if source.kind == "released" and optional & set(found):
        problems.append("language_model.lm_head.weight: the config ties it to the embedding, the file holds another")
    for key, (shape, _) in found.items():
        if key in wanted and shape != wanted[key]:
            problems.append(f"{key}: is {list(shape)}, should be {list(wanted[key])}")
    if source.kind == "released":
        floats = {k for k, v in vla.state_dict().items() if v.is_floating_point()}
        problems += _dtype_problems({k: dtype for k, (_, dtype) in found.items() if k in floats}, stated)
    if problems:
        raise CheckpointError(source.path, problems)


def _dtype_problems(found: Mapping[str, torch.dtype], stated: torch.dtype | None) -> list[str]:
    usual = Counter(found.values()).most_common(1)[0][0] if found else torch.float32
    if usual not in _FLOATS:
        return [f"the weights are {usual}; expected float32, bfloat16 or float16"]
    problems = [f"{k}: is {dtype}, the other weights are {usual}" for k, dtype in found.items() if dtype != usual]
    if stated is not None and stated != usual:
        problems.append(f"config.json says torch_dtype {stated}, the weights are {usual}: correct one")
    return problems


def fill(
    source: Source,
    vla: VLA,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    copy: bool = True,
) -> None:
    """Copy `tensors` into the model, each cast and placed on its way; without `dtype` and `device` as the model has it.

    Without `copy`, what needs neither stays where it is: on disk, for tensors of a mapped file.

    Raises:
        CheckpointError: for values that are not finite.
    """
    own = vla.state_dict()
    placed, broken = {}, []
    for name, tensor in tensors.items():
        key = modern_name(name)
        there = own[key]
        if device is None:
            on_meta = there.device.type == "meta"
            place, kind = ("cpu", torch.get_default_dtype()) if on_meta else (there.device, there.dtype)
        else:
            place, kind = device, dtype or tensor.dtype
        if tensor.is_floating_point():
            if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
                broken.append(f"{key}: holds values that are not finite")
            placed[key] = tensor.to(place, kind, copy=copy)
        else:
            placed[key] = tensor.to(place, copy=copy)
    if broken:
        raise CheckpointError(source.path, broken)
    vla.load_state_dict(placed, strict=False, assign=True)
