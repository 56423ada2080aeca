"""Loading of any known format into a model, with all problems in one error and one file in memory at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvla_lightning.checkpoint.format import CheckpointError, Description
from openvla_lightning.checkpoint.formats import check_base, describe, with_base
from openvla_lightning.checkpoint.tensors import begin_added, check_fits, fill, usual_dtype, with_added
from openvla_lightning.checkpoint.training import learnt_names
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.model.vla import VLA, About
from openvla_lightning.processor import Processor
from openvla_lightning.strategy import LoRA, from_config
from openvla_lightning.strategy.lora import merge as merge_adapters


def load_vla(
    path: str | Path | Description,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    guard: bool = True,
    merge: bool | None = None,
    base: str | Path | None = None,
    copy: bool = True,
) -> VLA:
    """Load a VLA; see `VLA.from_pretrained`.

    Args:
        path: the checkpoint, or its description.
        dtype: of the parameters; None: as in the checkpoint. Unmerged adapters keep their own.
        device: device of the parameters.
        guard: check that the image reaches the logits.
        merge: merge LoRA adapters into their layers. None: yes, unless the checkpoint is a whole model whose layout
            stores them separately, such as released OpenVLA-OFT folders with FiLM.
        base: present location of an adapter's base; None: its location during training.
        copy: False leaves tensors that need no cast on the disk until they are used.

    Raises:
        CheckpointError: something does not fit, for example a wrong base.
    """
    description = with_base(describe(path).check(), base)
    if description.base is not None:
        base = description.base.path if base is None else base
        check_base(description.base, base, description.path)
    try:
        strategy = from_config(description.strategy) if description.strategy else None
        with torch.device("meta"):
            vla = VLA.from_config(description.vla)
        if description.base is not None:
            load_weights(vla, str(base), dtype=dtype, device=device, copy=copy)
        if isinstance(strategy, LoRA):
            with torch.device("meta"):
                strategy.inject(vla)
    except CheckpointError:
        raise
    except Exception as error:  # a file from outside can be wrong in any way
        problem = f"what it says describes no model that can be built: {type(error).__name__}: {error}"
        raise CheckpointError(description.path, [problem]) from error
    available = dict(description.shapes)
    if description.base is not None:
        learnt = learnt_names(vla)
        available |= {k: (tuple(v.shape), v.dtype) for k, v in vla.state_dict().items() if k not in learnt}
    check_fits(description, vla, available)
    if dtype is None and description.one_dtype[0]:
        dtype = usual_dtype(description.shapes)
    for tensors in description.format.tensors(description):
        adapters = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
        others = {name: tensor for name, tensor in tensors.items() if name not in adapters}
        fill(description.path, vla, others, dtype, device, copy)
        fill(description.path, vla, adapters, None, device, copy)
    vla.language_model.tie_weights()
    vla.to(device)
    if isinstance(strategy, LoRA) and (not description.keeps_adapters if merge is None else merge):
        merge_adapters(vla)
        vla.requires_grad_(True)
    vla.about = _about(description)
    vla.eval()
    if guard:
        check_image_matters(vla, description.path)
    return vla


def load_checkpoint(
    path: str | Path | Description,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    guard: bool = True,
    merge: bool = True,
    base: str | Path | None = None,
    action_chunk: int | None = None,
    **processor_changes: Any,
) -> tuple[VLA, Processor, dict[str, Any]]:
    """Load everything for acting: model, processor, action statistics per dataset.

    Args:
        path: as in `VLA.from_pretrained`, or its description; so are `dtype`, `device` and `guard`.
        merge, base: as in `load_vla`.
        action_chunk: T, for a folder of OpenVLA-OFT, which does not say it. For a model with action tokens, it also
            means that all tokens are predicted in parallel.
        processor_changes: arguments of `Processor` to replace, such as `tokenizer`, `crop_area` or `cameras`.

    Raises:
        CheckpointError: as in `load_vla`, or when the length of a chunk is not known.
    """
    description = with_base(describe(path).check(), base)
    description = replace(description, processor=_with_chunk(description, action_chunk))
    processor = Processor.from_config(description.processor, **processor_changes)
    vla = load_vla(description, dtype, device, guard, merge, base)
    return vla, processor, vla.norm_stats


def _with_chunk(description: Description, action_chunk: int | None) -> dict[str, Any]:
    """The processor's config with the length of a chunk."""
    head = dict(description.processor["action_head"])
    if action_chunk is not None:
        tokens = head.get("class", "TokenHead") == "TokenHead"
        head |= {"action_chunk": action_chunk, **({"parallel": True} if tokens else {})}
    if head.get("action_chunk", 1) is None:
        problem = "it does not say how many actions a chunk has: pass action_chunk=8, or as many as it was trained with"
        raise CheckpointError(description.path, [problem])
    return {**description.processor, "action_head": head}


def load_weights(
    vla: VLA,
    path: str | Path,
    frozen_vision: Callable[[], VisionBackbone] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    copy: bool = True,
) -> None:
    """Load the weights of `path` into an existing model, keeping its devices, dtypes and strategy.

    Without a `device`, parameters on the meta device become real, on the CPU, in torch's default dtype.

    Args:
        vla: the model. Parts that a released VLA lacks (`VLA.added`) keep their own weights if the files lack them.
        path: as in `VLA.from_pretrained`; its description of the architecture is ignored.
        frozen_vision: builds the vision backbone with its own weights, for a checkpoint that lacks it because it was
            frozen.
        dtype: of the parameters, if a `device` is given; None: as in the files.
        device: device of the parameters.
        copy: as in `load_vla`.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; it lists all of them.
    """
    description = describe(path)
    if description.base is not None or any(".lora_" in name for name in description.shapes):
        loaded = load_vla(description, guard=False, merge=True)  # an adapter is merged first
        batches: Iterator[dict[str, Tensor]] = iter([loaded.state_dict()])
        shapes = {k: (tuple(v.shape), v.dtype) for k, v in loaded.state_dict().items()}
    else:
        batches, shapes = description.format.tensors(description), dict(description.shapes)
    complete = "vision_backbone" not in description.absent or frozen_vision is None
    if not complete and frozen_vision is not None:
        vla.vision_backbone = frozen_vision()
        if vla.film is not None:
            vla.vision_backbone.add_film(vla.llm.dim)
        vision_state = vla.vision_backbone.state_dict()
        shapes |= {f"vision_backbone.{k}": (tuple(v.shape), v.dtype) for k, v in vision_state.items()}
    check_fits(description, vla, with_added(vla, shapes))
    for tensors in batches:
        fill(description.path, vla, tensors, dtype, device, copy)
    vla.about = replace(_about(description), recipe={}, weights_from=str(path) if complete else None)
    vla.language_model.tie_weights()


def start_from(vla: VLA) -> None:
    """Load the weights that `init_from` names into a model that was built with it; see `load_weights`. Not on meta."""
    if (start := vla.start) is not None and torch.get_default_device().type != "meta":
        device = None if start.dtype is None else "cpu"
        load_weights(vla, start.path, start.vision_backbone, dtype=start.dtype, device=device)
        begin_added(vla)


def _about(description: Description) -> About:
    """The `About` of a model, from its checkpoint's description."""
    return About(
        norm_stats=description.norm_stats,
        recipe=description.recipe,
        json_files=description.json_files or dict(description.vla.get("released") or {}),
        folder=description.folder,
    )


@torch.inference_mode()
def check_image_matters(vla: VLA, path: str | Path = "the model") -> None:
    """Refuse a model with the same answer for a black and a white image (transformers once silently dropped the image).

    The check uses only a few of the visual tokens, so it is fast compared with loading.

    Raises:
        CheckpointError: when the logits are bit-equal.
    """
    backbone, llm = vla.vision_backbone, vla.language_model
    towers = len(backbone.featurizers)
    device = next(vla.parameters()).device
    shape = (1, 3 * towers, backbone.image_size, backbone.image_size)
    pixels = torch.cat([torch.full(shape, value, device=device) for value in (-1.0, 1.0)])
    bos = llm.embed(torch.full((2, 1), llm.architecture.get("bos_token_id", 1), device=device))
    visual = vla.projector(backbone(pixels, bos[:, 0] if vla.film else None))
    visual = visual[:, :: max(1, visual.shape[1] // 16)]
    black, white = llm.logits(llm.decode(torch.cat([bos, visual.to(bos.dtype)], dim=1))[:, -1])
    if torch.equal(black, white):
        raise CheckpointError(path, ["a black and a white image give the same logits: the image does not reach them"])
