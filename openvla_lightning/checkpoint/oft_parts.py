"""The files that OpenVLA-OFT puts beside a released VLA, one for each part: their names and contents."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openvla_lightning.checkpoint.architecture import OURS
from openvla_lightning.checkpoint.format import CheckpointError, read_json
from openvla_lightning.checkpoint.tensors import read_pickle
from openvla_lightning.model.vla import VLA
from openvla_lightning.runtime.files import written_whole
from openvla_lightning.strategy.lora import RELEASED_TARGETS, adapted_layers, merged_state, merged_weight

PARTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
"""Files of a folder, `PART--STEP_checkpoint.pt`, with STEP a number or `latest`."""

PART_FILE = re.compile(rf"({'|'.join(PARTS)})--(\d+|latest)_checkpoint\.pt")
ADAPTER_NAME = "default"
"""peft's default name of an adapter, which is part of its tensors' names."""
FILM_NAME = re.compile(r"\.blocks\.\d+\.(scale|shift)\.")
ALPHA = 16
"""The released alpha of LoRA is the rank, but at most this."""

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Parts:
    """Contents of the files beside a released VLA.

    Attributes:
        files: part -> file.
        head: `l1`, `diffusion`, or None if actions are tokens.
        action_dim: D, from the head's shapes; None for tokens.
        proprio_dim: P, from the shapes of the proprioception's projector; None without one.
        film: whether the towers have FiLM; then the vision backbone's weights come from its own file.
        adapters: names of layers of the vision backbone whose LoRA adapter was stored separately.
        rank: rank of these adapters.
        shapes: shapes of all tensors, under our names.
    """

    files: Mapping[str, Path]
    head: Literal["l1", "diffusion"] | None = None
    action_dim: int | None = None
    proprio_dim: int | None = None
    film: bool = False
    adapters: tuple[str, ...] = ()
    rank: int | None = None
    shapes: Shapes = field(default_factory=dict)

    @property
    def step(self) -> str | None:
        """The STEP in the files' names; None without files."""
        steps = [match.group(2) for path in self.files.values() if (match := PART_FILE.fullmatch(path.name))]
        return steps[0] if steps else None

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """Tensors under our names, one file at a time; they stay in the memory-mapped file until they are copied."""
        for part, path in self.files.items():
            yield {our_name(part, key): tensor for key, tensor in read_pickle(path).items()}


def our_name(part: str, key: str) -> str:
    """The name in `VLA.state_dict()` of `key` in the file of `part`.

    DDP added the prefix `module.` to all parts except the vision backbone, whose blocks FiLM wrapped.
    """
    if part == "vision_backbone":
        return re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", key)
    name = key.removeprefix("module.")
    owner = "action_head.noisy_action_projector" if part == "noisy_action_projector" else part
    return f"{owner}.{name}"


def released_name(part: str, name: str) -> str:
    """The inverse of `our_name`."""
    if part == "vision_backbone":
        return re.sub(r"(\.blocks\.\d+)\.(?!scale\.|shift\.)", r"\1.block.", name)
    owner = "action_head.noisy_action_projector" if part == "noisy_action_projector" else part
    return f"module.{name.removeprefix(f'{owner}.')}"


def part_of(name: str, film: bool) -> str | None:
    """The part whose file holds the tensor `name` of a VLA; None: it is in the released VLA's files."""
    if name.startswith("action_head.noisy_action_projector."):
        return "noisy_action_projector"
    for part in ("action_head", "proprio_projector"):
        if name.startswith(f"{part}."):
            return part
    return "vision_backbone" if film and name.startswith("vision_backbone.") else None


def read_parts(folder: Path) -> Parts:
    """Find the parts of a folder and interpret them, from names and shapes only.

    Raises:
        CheckpointError: files are duplicate, of different steps, damaged or contradictory; it lists all problems.
    """
    files, problems = _files(folder)
    shapes: Shapes = {}
    shapes_by_part: dict[str, Shapes] = {}
    for part, path in files.items():
        try:
            content = read_pickle(path)
        except CheckpointError as error:
            problems += error.problems
            continue
        strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
        problems += [f"{path.name}: {key} is no tensor" for key in strange]
        shapes_by_part[part] = {
            our_name(part, key): (tuple(value.shape), value.dtype)
            for key, value in content.items()
            if isinstance(value, Tensor)
        }
        shapes |= shapes_by_part[part]
    if problems:
        raise CheckpointError(folder, problems)
    head, action_dim = (None, None) if _is_said(folder) else _head(files, shapes_by_part, problems)
    proprio = shapes.get("proprio_projector.fc1.weight")
    if "proprio_projector" in files and (proprio is None or len(proprio[0]) != 2):
        problems.append(f"{files['proprio_projector'].name}: there is no module.fc1.weight [dim, proprio_dim]")
    adapters, rank = _adapters(shapes_by_part.get("vision_backbone", {}), files, problems)
    if "vision_backbone" in shapes_by_part and not any(".scale." in name for name in shapes_by_part["vision_backbone"]):
        problems.append(f"{files['vision_backbone'].name}: holds no FiLM layers (scale, shift)")
    if problems:
        raise CheckpointError(folder, problems)
    return Parts(
        files=files,
        head=head,
        action_dim=action_dim,
        proprio_dim=None if proprio is None else proprio[0][1],
        film="vision_backbone" in files,
        adapters=adapters,
        rank=rank,
        shapes=shapes,
    )


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    paths_by_part: dict[str, list[Path]] = {}
    steps = set()
    for path in sorted(folder.iterdir()):
        if match := PART_FILE.fullmatch(path.name):
            paths_by_part.setdefault(match.group(1), []).append(path)
            steps.add(match.group(2))
    problems = [
        f"several files for {part}: {', '.join(path.name for path in paths)}; keep one"
        for part, paths in paths_by_part.items()
        if len(paths) > 1
    ]
    if not problems and len(steps) > 1:
        problems.append(f"the parts are of different steps: {', '.join(sorted(steps))}")
    return {part: paths_by_part[part][0] for part in PARTS if part in paths_by_part}, problems


def _is_said(folder: Path) -> bool:
    """Whether the folder is our export of a head that OpenVLA-OFT does not have."""
    path = folder / "config.json"
    said = (read_json(path).get(OURS) or {}).get("action_head") if path.is_file() else None
    return said is not None and said.get("class") not in ("L1Head", "DiffusionHead")


def _head(
    files: Mapping[str, Path], shapes_by_part: Mapping[str, Shapes], problems: list[str]
) -> tuple[Literal["l1", "diffusion"] | None, int | None]:
    if "action_head" not in files:
        if "noisy_action_projector" in files:
            problems.append(f"{files['noisy_action_projector'].name}: there is no action_head--N_checkpoint.pt with it")
        return None, None
    names, file = shapes_by_part["action_head"], files["action_head"].name
    kinds: dict[str, Literal["l1", "diffusion"]] = {
        "action_head.model.": "l1",
        "action_head.noise_predictor.mlp_resnet.": "diffusion",
    }
    heads = {kind for name in names for start, kind in kinds.items() if name.startswith(start)}
    strange = [name for name in names if not name.startswith(tuple(kinds))]
    problems += [f"{file}: {name.removeprefix('action_head.')} belongs to no known head" for name in strange]
    if len(heads) != 1:
        problems.append(f"{file}: holds {' and '.join(sorted(heads)) or 'no'} head; expected l1 or diffusion")
        return None, None
    head = heads.pop()
    start = next(start for start, kind in kinds.items() if kind == head)
    last, first = names.get(f"{start}fc2.weight"), names.get(f"{start}fc1.weight")
    if (head == "diffusion") != ("noisy_action_projector" in files):
        problems.append(
            f"{file}: a diffusion head needs noisy_action_projector--N_checkpoint.pt"
            if head == "diffusion"
            else f"{files['noisy_action_projector'].name}: {file} holds an l1 head, which takes no noisy actions"
        )
    if last is None or first is None or len(last[0]) != 2 or len(first[0]) != 2:
        problems.append(f"{file}: there is no fc1.weight and fc2.weight of two dimensions")
        return head, None
    action_dim, hidden = last[0]
    if first[0] != (hidden, hidden * action_dim):
        problems.append(
            f"{file}: fc1.weight is {list(first[0])}, {action_dim} actions mean {[hidden, hidden * action_dim]}"
        )
    return head, action_dim


def _adapters(names: Shapes, files: Mapping[str, Path], problems: list[str]) -> tuple[tuple[str, ...], int | None]:
    """Layers with an adapter, and its rank."""
    ends = {kind: f".lora_{kind}.{ADAPTER_NAME}.weight" for kind in "AB"}
    layers = {kind: {name.removesuffix(end) for name in names if name.endswith(end)} for kind, end in ends.items()}
    bases = {name.removesuffix(".base_layer.weight") for name in names if name.endswith(".base_layer.weight")}
    every = layers["A"] | layers["B"] | bases
    file = files["vision_backbone"].name if "vision_backbone" in files else ""
    for what, has in (("lora_A", layers["A"]), ("lora_B", layers["B"]), ("base_layer", bases)):
        problems += [f"{file}: {layer} lacks its {what}" for layer in sorted(every - has)]
    ranks = {names[f"{layer}{ends['A']}"][0][0] for layer in layers["A"]}
    if len(ranks) > 1:
        problems.append(f"{file}: adapters of several ranks {sorted(ranks)}")
    return tuple(sorted(every)), min(ranks, default=None)


def keeps_apart(vla: VLA) -> bool:
    """Whether the towers' adapters fit the released loader: one on every layer, with one rank and the released alpha.

    Other adapters must be merged before the towers are written.
    """
    layers = {
        name: module
        for name, module in vla.vision_backbone.named_modules()
        if name.rpartition(".")[2] in RELEASED_TARGETS and not isinstance(module, nn.Identity | nn.Dropout)
    }
    adapted: list[Any] = [layer for name, layer in adapted_layers(vla.vision_backbone).items() if name in layers]
    if not adapted or len(adapted) < len(layers):
        return False
    ranks = {module.r[ADAPTER_NAME] for module in adapted}
    scales = {module.scaling[ADAPTER_NAME] for module in adapted}
    dora = any(module.use_dora[ADAPTER_NAME] for module in adapted)
    return len(ranks) == 1 and scales == {min(ALPHA, *ranks) / min(ranks)} and not dora


def write_parts(vla: VLA, folder: Path, step: int | str, dtype: torch.dtype | None = None, rank: int = 32) -> None:
    """Write the parts of `vla` that released VLAs lack, each into its file as released.

    The released loader of a vision backbone with FiLM expects an adapter of a given rank (32) on every linear layer of
    the towers. If there are no such adapters, existing ones are merged and adapters of zeros are written.

    Args:
        vla: the model.
        folder: an existing folder; parts of another model are removed.
        step: the training step in the files' names.
        dtype: dtype of the action head, the towers and their adapters; projectors and FiLM keep theirs, as released.
            None: all keep theirs.
        rank: rank of the adapters of zeros.
    """
    film = vla.film is not None
    state: dict[str, Tensor] = {}
    if film and keeps_apart(vla):
        state |= {name: tensor for name, tensor in vla.state_dict().items() if part_of(name, film) is not None}
    else:
        for name, (tensor, adapter) in merged_state(vla).items():
            if part_of(name, film) is not None:
                state[name] = tensor if adapter is None else merged_weight(adapter).to(tensor.dtype)
    for name, tensor in state.items():
        wide = name.startswith(("proprio_projector.", "action_head.noisy")) or FILM_NAME.search(name)
        state[name] = tensor if dtype is None or wide else tensor.to(dtype)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if (part := part_of(name, film)) is not None:
            parts.setdefault(part, {})[released_name(part, name)] = tensor.detach().cpu().contiguous()
    if film and not any(".lora_A." in name for name in parts["vision_backbone"]):
        parts["vision_backbone"] = _with_idle_adapters(parts["vision_backbone"], rank)
    written = {part: folder / f"{part}--{step}_checkpoint.pt" for part in parts}
    for part, path in written.items():
        with written_whole(path) as beside:
            torch.save(dict(parts[part]), beside)
    for old in folder.iterdir():
        if PART_FILE.fullmatch(old.name) and old not in written.values():
            old.unlink()


def _with_idle_adapters(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A tower's tensors with an adapter of zeros on each layer that the released LoRA adapts."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, end = name.rpartition(".")
        if layer.rpartition(".")[2] not in RELEASED_TARGETS:
            result[name] = tensor
            continue
        result[f"{layer}.base_layer.{end}"] = tensor
        if end == "weight":
            inner, ones = tensor.shape[1:], [1] * (tensor.ndim - 2)
            result[f"{layer}.lora_A.{ADAPTER_NAME}.weight"] = tensor.new_zeros(rank, *inner)
            result[f"{layer}.lora_B.{ADAPTER_NAME}.weight"] = tensor.new_zeros(len(tensor), rank, *ones)
    return result
