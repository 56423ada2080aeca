"""Released CogACT models: a training run of the released code whose `.pt` also holds the action model."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvla_lightning.action_head.cogact import CogACTHead
from openvla_lightning.checkpoint.architecture import OURS
from openvla_lightning.checkpoint.format import Description, read_json
from openvla_lightning.checkpoint.prismatic import Prismatic, checkpoint_file, run_config, training_name
from openvla_lightning.checkpoint.save import more_than_one_picture
from openvla_lightning.checkpoint.tensors import holds_text
from openvla_lightning.model.vla import VLA
from openvla_lightning.plugins import USUAL_HEAD, describe
from openvla_lightning.processor import Processor
from openvla_lightning.runtime.files import written_whole
from openvla_lightning.strategy.lora import merged_state, merged_weight

HEADS = {384: 4, 768: 12, 1024: 16}
"""Width of the released networks S, B and L -> number of attention heads, which no shape shows."""

_PART = "action_model"
_AVERAGED = "ema_diffusion"
_SETTINGS = ("prompt", "resize_strategy", "crop_area", "cameras", "max_length")
"""Arguments of a `Processor` that a released run does not store."""


class CogACT:
    """RUN/config.json, RUN/dataset_statistics.json and RUN/checkpoints/*.pt with the key `model.action_model`."""

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a `.pt`, or a folder whose `checkpoints` hold some, with an action model."""
        if not Prismatic().recognises(path):
            return False
        return holds_text(checkpoint_file(path), _PART)

    def describe(self, path: Path) -> Description:
        """The description of a Prismatic run, with an action head according to the action model's names and shapes.

        Raises:
            CheckpointError: as for a Prismatic run, and for an action model of another kind.
        """
        plain = Prismatic().describe(path)
        said = _said(path)
        head, problems = said.get("action_head"), list[str]()
        shapes = {our_name(name): shape for name, shape in plain.shapes.items() if not name.startswith(_AVERAGED)}
        if head is None:
            head, problems = _head(shapes)
        if plain.problems or problems:
            return replace(plain, format=self, shapes=shapes, problems=[*plain.problems, *problems])
        settings = {name: value for name, value in (said.get("processor") or {}).items() if name in _SETTINGS}
        return replace(
            plain,
            format=self,
            shapes=shapes,
            vla={**plain.vla, "action_head": head},
            processor={**plain.processor, **settings, "action_head": head},
        )

    def tensors(self, description: Description) -> Iterator[dict[str, Tensor]]:
        """All tensors at once, memory-mapped from the file, without the moving average of the weights."""
        for tensors in Prismatic().tensors(description):
            yield {our_name(name): tensor for name, tensor in tensors.items() if not name.startswith(_AVERAGED)}


def our_name(name: str) -> str:
    """The name in `VLA.state_dict()` of a tensor of the action model; other names do not change."""
    return f"action_head.{name.removeprefix(f'{_PART}.net.')}" if name.startswith(f"{_PART}.") else name


def _said(path: Path) -> dict[str, Any]:
    """The settings that our export wrote: the head's and the processor's; empty for released runs."""
    run = path if path.is_dir() else path.parent.parent
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    return said if isinstance(said := config.get(OURS), dict) else {}


def _head(shapes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config of a released head from its shapes, or the reasons why it is none."""
    needed = ("positional_embedding", "x_embedder.linear.weight")
    needed_shapes = {name: shapes.get(f"action_head.{name}", ((),))[0] for name in needed}
    if missing := [f"{_PART}.net.{name}: missing" for name, shape in needed_shapes.items() if len(shape) != 2]:
        return {}, missing
    (tokens, hidden), (_, dim) = needed_shapes.values()
    depth = len({name.split(".")[2] for name in shapes if name.startswith("action_head.blocks.")})
    if hidden not in HEADS:
        known = ", ".join(map(str, HEADS))
        return {}, [f"{_PART} is {hidden} wide, released ones {known}: nothing says how many heads it has"]
    head = CogACTHead(tokens - 1, dim, hidden, depth, HEADS[hidden])
    return describe(head, USUAL_HEAD), []


def save_cogact(
    vla: VLA,
    processor: Processor,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    name: str = "latest-checkpoint.pt",
) -> Path:
    """Write a model with a CogACT head in the layout of the released code: config, statistics, one `.pt`.

    Adapters are merged. Settings that the released config has no field for are under our own key.

    Args:
        vla: the model.
        processor: the processor of its training, with the head.
        folder: the run's folder; created if necessary.
        dtype: dtype of the weights in the file; None: unchanged.
        name: name of the file in `checkpoints/`.

    Returns:
        The file.

    Raises:
        ValueError: for another head, or a model with parts that the released code does not know.
    """
    head, folder = processor.action_head, Path(folder)
    if not isinstance(head, CogACTHead):
        raise ValueError(f"a CogACT run holds a CogACT head, not a {type(head).__name__}: leave the layout cogact out")
    if added := more_than_one_picture(vla, processor):
        raise ValueError(f"a CogACT run has no place for {', '.join(added)}")
    config = run_config(vla.config)
    sizes = dict(zip(HEADS, "SBL", strict=True))
    config["action_model_type"] = f"DiT-{sizes.get(head.size['hidden'], 'own')}"
    config["future_action_window_size"] = head.action_chunk - 1
    settings = {name: value for name, value in processor.config.items() if name in _SETTINGS}
    config[OURS] = {"action_head": describe(head, USUAL_HEAD), "processor": settings}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, (tensor, adapter) in merged_state(vla).items():
        value = (tensor if adapter is None else merged_weight(adapter)).detach().cpu().contiguous()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        part, name_in_part = _PART, f"net.{key.removeprefix('action_head.')}"
        if not key.startswith("action_head."):
            part, name_in_part = training_name(key, list(vla.vision_backbone.towers))
        parts.setdefault(part, {})[name_in_part] = value
    path = folder / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "dataset_statistics.json").write_text(json.dumps(vla.norm_stats, indent=2) + "\n", encoding="utf-8")
    with written_whole(path) as beside:
        torch.save({"model": parts}, beside)
    return path
