"""Loading: any known source of weights into a VLA, every problem in one error, one file in memory at a time."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openvla_lightning.model import preprocessing, prismatic
from openvla_lightning.model.guard import check_image_matters
from openvla_lightning.model.norm_stats import read_norm_stats
from openvla_lightning.model.released import generation_problems, stated_dtype, vla_config
from openvla_lightning.model.source import (
    CheckpointError,
    Source,
    check_source,
    find_source,
    modern_name,
    read_json,
    read_pickle,
    read_tensors,
    tensor_shapes,
)
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.model.vla import VLA

if TYPE_CHECKING:
    from openvla_lightning.processor import Processor

__all__ = ["CheckpointError", "check_source", "load_checkpoint", "load_vla", "load_weights"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def load_vla(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    guard: bool = True,
    merge: bool = True,
) -> VLA:
    """Load a VLA; see `VLA.from_pretrained`.

    Args:
        path: what to load.
        dtype: of the parameters; None keeps the checkpoint's.
        device: where they go.
        guard: check that the image reaches the logits.
        merge: fold LoRA adapters of our checkpoints into the layers they adapt.
    """
    source = find_source(path)
    if source.kind == "lightning":
        vla = _load_lightning(source, dtype, device, merge)
    else:
        vla = _load_released(source, dtype, device)
    vla.eval()
    if guard:
        check_image_matters(vla, path)
    return vla


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    guard: bool = True,
    merge: bool = True,
    **processor_changes: Any,
) -> "tuple[VLA, Processor, dict[str, Any]]":
    """Load all that acting needs: model, processor, action statistics per dataset.

    Args:
        path: as in `VLA.from_pretrained`; so are `dtype`, `device` and `guard`.
        merge: fold LoRA adapters into the layers they adapt.
        processor_changes: arguments of `Processor` to replace, such as `tokenizer` or `crop_area`.
    """
    from openvla_lightning.processor import Processor

    processor = Processor.from_pretrained(path, **processor_changes)
    vla = load_vla(path, dtype, device, guard, merge)
    return vla, processor, vla.norm_stats


def load_weights(vla: VLA, path: str | Path, frozen_vision: Callable[[], VisionBackbone] | None = None) -> None:
    """Fill a model that has been built with the weights of `path`, keeping its dtypes, devices and strategy.

    Parameters on the meta device become real, on the CPU, in torch's default dtype.

    Args:
        vla: to be filled.
        path: as in `VLA.from_pretrained`.
        frozen_vision: builds the vision backbone with its own weights, for a Prismatic checkpoint that lacks it
            because it was frozen.

    Raises:
        CheckpointError: naming every key that is missing, surplus or of another shape.
    """
    source = find_source(path)
    if source.kind == "lightning":
        loaded = _load_lightning(source, None, "cpu", merge=True)
        vla.norm_stats, vla.released = loaded.norm_stats, loaded.released
        state = loaded.state_dict()
        _check(source, vla, {k: (tuple(v.shape), v.dtype) for k, v in state.items()}, None)
        _fill(source, vla, state)
    else:
        shapes = {modern_name(k): v for k, v in tensor_shapes(source).items()}
        lacks_vision = source.kind == "prismatic" and not any(key.startswith("vision_backbone.") for key in shapes)
        if lacks_vision and frozen_vision is not None:
            vla.vision_backbone = frozen_vision()
            shapes |= {
                f"vision_backbone.{k}": (tuple(v.shape), v.dtype) for k, v in vla.vision_backbone.state_dict().items()
            }
        _check(source, vla, shapes, None)
        for tensors in read_tensors(source):
            _fill(source, vla, tensors)
        config = read_json(source.path / "config.json") if source.kind == "released" else {}
        vla.norm_stats = read_norm_stats(source, config.get("norm_stats") or {})
        vla.released = _released_files(source.path, config) if config else {}
        vla.origin = source.path if config else None
    vla.language_model.tie_weights()


def _load_released(source: Source, dtype: torch.dtype | None, device: torch.device | str) -> VLA:
    shapes = {modern_name(k): v for k, v in tensor_shapes(source).items()}
    if source.kind == "prismatic":
        config = prismatic.released_config(source, shapes)
    else:
        config = read_json(source.path / "config.json")
    layers = sum(k.startswith("language_model.model.layers.") and k.endswith("q_proj.weight") for k in shapes)
    vla = _on_meta(source, config, layers)
    files = _released_files(source.path, config) if source.kind == "released" else {}
    problems = preprocessing.preprocessing_problems(config, files.get(preprocessing.FILE, {}))
    problems += generation_problems(config, files.get("generation_config.json", {}))
    if problems:
        raise CheckpointError(source.path, problems)
    _check(source, vla, shapes, stated_dtype(config) if source.kind == "released" else None)
    vla.norm_stats = read_norm_stats(source, config.get("norm_stats") or {})
    if source.kind == "released":
        vla.released, vla.origin = files, source.path
    for tensors in read_tensors(source):
        _fill(source, vla, tensors, dtype, device)
    vla.language_model.tie_weights()
    return vla.to(device)


def _on_meta(source: Source, config: dict[str, Any], layers: int) -> VLA:
    """The architecture `config` describes, without weights.

    The file's own number of layers comes first: a config that claims a billion would keep us building.
    """
    described = vla_config(config, str(source.path))
    claimed = described["llm"]["architecture"].get("num_hidden_layers", 32)
    if layers and claimed != layers:
        raise CheckpointError(
            source.path, [f"config.json: text_config says num_hidden_layers={claimed}, the weights have {layers}"]
        )
    try:
        with torch.device("meta"):
            return VLA.from_config(described)
    except Exception as error:  # a config from outside can be wrong in any way
        problem = f"config.json does not describe a model that can be built: {type(error).__name__}: {error}"
        raise CheckpointError(source.path, [problem]) from error


def _check(source: Source, vla: VLA, found: Shapes, stated: torch.dtype | None) -> None:
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


def _fill(
    source: Source,
    vla: VLA,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Copy `tensors` into the model, each cast and placed on its way; without `dtype` and `device` as the model has it.

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
            placed[key] = tensor.to(place, kind, copy=True)
        else:
            placed[key] = tensor.to(place, copy=True)
    if broken:
        raise CheckpointError(source.path, broken)
    vla.load_state_dict(placed, strict=False, assign=True)


def _released_files(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    names = ("preprocessor_config.json", "generation_config.json")
    files = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
    return {"config.json": {k: v for k, v in config.items() if k != "norm_stats"}, **files}


def lightning_contents(source: Source) -> dict[str, Any]:
    """What our checkpoint says of itself, and its tensors.

    Raises:
        CheckpointError: when it was written by something else.
    """
    content = read_pickle(source.path)
    about = content.get("openvla_lightning")
    if not isinstance(about, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(source.path, ["is not a checkpoint that train.py or finetune.py wrote"])
    missing = [key for key in ("vla", "processor", "norm_stats") if not isinstance(about.get(key), dict)]
    if missing:
        raise CheckpointError(source.path, [f"the checkpoint does not describe its {name}" for name in missing])
    return content


def _load_lightning(source: Source, dtype: torch.dtype | None, device: torch.device | str, merge: bool) -> VLA:
    from openvla_lightning.strategy import LoRA, from_config
    from openvla_lightning.strategy.lora import merge as merge_adapters

    content = lightning_contents(source)
    about = content["openvla_lightning"]
    state = {k.removeprefix("vla."): v for k, v in content["state_dict"].items() if k.startswith("vla.")}
    try:
        strategy = from_config(about["strategy"]) if about.get("strategy") else None
        with torch.device("meta"):
            vla = VLA.from_config(about["vla"])
            if isinstance(strategy, LoRA):
                strategy.apply(vla)
    except Exception as error:  # a file from outside can be wrong in any way
        raise CheckpointError(source.path, [f"its model cannot be built: {type(error).__name__}: {error}"]) from error
    _check(source, vla, {k: (tuple(v.shape), v.dtype) for k, v in state.items()}, None)
    _fill(source, vla, state, dtype, device)
    vla.language_model.tie_weights()
    vla.to(device)
    if isinstance(strategy, LoRA) and merge:
        merge_adapters(vla)
        vla.requires_grad_(True)
    method = about.get("normalisation", "quantile")
    vla.norm_stats = {name: {"normalisation": method, **stats} for name, stats in about["norm_stats"].items()}
    vla.recipe = dict(content.get("hyper_parameters") or {})
    return vla
