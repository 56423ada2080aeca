"""Loading: any known source of weights into a VLA, every problem in one error, one file in memory at a time."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openvla_lightning.model import preprocessing, prismatic
from openvla_lightning.model.filling import check_fits, fill
from openvla_lightning.model.guard import check_image_matters
from openvla_lightning.model.lightning import load_lightning
from openvla_lightning.model.norm_stats import read_norm_stats
from openvla_lightning.model.released import generation_problems, stated_dtype, vla_config
from openvla_lightning.model.source import (
    CheckpointError,
    Source,
    check_source,
    find_source,
    modern_name,
    read_json,
    read_tensors,
    tensor_shapes,
)
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.model.vla import VLA

if TYPE_CHECKING:
    from openvla_lightning.processor import Processor

__all__ = ["CheckpointError", "check_source", "load_checkpoint", "load_vla", "load_weights"]


def load_vla(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    guard: bool = True,
    merge: bool = True,
    base: str | Path | None = None,
    copy: bool = True,
) -> VLA:
    """Load a VLA; see `VLA.from_pretrained`.

    Args:
        path: what to load.
        dtype: of the parameters; None keeps the checkpoint's.
        device: where they go.
        guard: check that the image reaches the logits.
        merge: fold LoRA adapters of our checkpoints into the layers they adapt.
        base: where an adapter's base is now; None: where it was when the adapter was trained.
        copy: False leaves on disk what needs no cast, until it is used.
    """
    source = find_source(path)
    if source.kind == "lightning":
        vla = load_lightning(source, dtype, device, merge, base, copy)
    else:
        vla = _load_released(source, dtype, device, copy)
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
    base: str | Path | None = None,
    **processor_changes: Any,
) -> "tuple[VLA, Processor, dict[str, Any]]":
    """Load all that acting needs: model, processor, action statistics per dataset.

    Args:
        path: as in `VLA.from_pretrained`; so are `dtype`, `device` and `guard`.
        merge, base: as in `load_vla`.
        processor_changes: arguments of `Processor` to replace, such as `tokenizer` or `crop_area`.
    """
    from openvla_lightning.processor import Processor

    processor = Processor.from_pretrained(path, **processor_changes)
    vla = load_vla(path, dtype, device, guard, merge, base)
    return vla, processor, vla.norm_stats


def load_weights(
    vla: VLA,
    path: str | Path,
    frozen_vision: Callable[[], VisionBackbone] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    copy: bool = True,
) -> None:
    """Fill a model that has been built with the weights of `path`, keeping its devices, dtypes and strategy.

    Without a `device`, parameters on the meta device become real, on the CPU, in torch's default dtype.

    Args:
        vla: to be filled.
        path: as in `VLA.from_pretrained`.
        frozen_vision: builds the vision backbone with its own weights, for a Prismatic checkpoint that lacks it
            because it was frozen.
        dtype: of the parameters, where a `device` is given; None what the files hold.
        device: where the parameters go.
        copy: as in `load_vla`.

    Raises:
        CheckpointError: naming every key that is missing, surplus or of another shape.
    """
    source, complete = find_source(path), True
    if source.kind == "lightning":
        loaded = load_lightning(source)
        vla.norm_stats, vla.released = loaded.norm_stats, loaded.released
        state = loaded.state_dict()
        check_fits(source, vla, {k: (tuple(v.shape), v.dtype) for k, v in state.items()}, None)
        fill(source, vla, state, dtype, device, copy)
    else:
        shapes = {modern_name(k): v for k, v in tensor_shapes(source).items()}
        lacks_vision = source.kind == "prismatic" and not any(key.startswith("vision_backbone.") for key in shapes)
        if lacks_vision and frozen_vision is not None:
            vla.vision_backbone = frozen_vision()
            complete = False
            shapes |= {
                f"vision_backbone.{k}": (tuple(v.shape), v.dtype) for k, v in vla.vision_backbone.state_dict().items()
            }
        check_fits(source, vla, shapes, None)
        for tensors in read_tensors(source):
            fill(source, vla, tensors, dtype, device, copy)
        config = read_json(source.path / "config.json") if source.kind == "released" else {}
        vla.norm_stats = read_norm_stats(source)
        vla.released = _released_files(source.path, config) if config else {}
        vla.origin = source.path if config else None
    vla.init_from = str(path) if complete else None
    vla.language_model.tie_weights()


def _load_released(source: Source, dtype: torch.dtype | None, device: torch.device | str, copy: bool) -> VLA:
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
    check_fits(source, vla, shapes, stated_dtype(config) if source.kind == "released" else None)
    vla.norm_stats = read_norm_stats(source)
    if source.kind == "released":
        vla.released, vla.origin = files, source.path
    for tensors in read_tensors(source):
        fill(source, vla, tensors, dtype, device, copy)
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


def _released_files(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    names = ("preprocessor_config.json", "generation_config.json")
    files = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
    return {"config.json": {k: v for k, v in config.items() if k != "norm_stats"}, **files}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m openvla_lightning.model.checkpoint export`."""
    from openvla_lightning.model.export import export

    parser = argparse.ArgumentParser("python -m openvla_lightning.model.checkpoint")
    command = parser.add_subparsers(required=True, metavar="export").add_parser(
        "export", help="write a run in the released layout, its adapter merged"
    )
    command.add_argument("source", help="folder of a run, its .ckpt, or any other model that can be loaded")
    command.add_argument("folder", type=Path, help="folder to write")
    command.add_argument("--base", help="where the base of an adapter is now, if it has moved")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the base is stored")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        folder = export(options.source, options.folder, options.base, dtype, options.overwrite)
    except (CheckpointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
