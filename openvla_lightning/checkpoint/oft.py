"""Released OpenVLA-OFT folders: a released VLA, and beside it the parts that OFT added, each in a separate file.

A folder does not say how long a chunk is, which cameras it was trained with, or how states and actions were scaled:
the released code chooses these by a word in its command line. All that names and shapes of tensors show is read and
checked here. The other settings are the released constants for the action dimension, unless our export stored them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from openvla_lightning.checkpoint.architecture import OURS
from openvla_lightning.checkpoint.format import Base, CheckpointError, Description, read_json, read_norm_stats
from openvla_lightning.checkpoint.oft_parts import ADAPTER_NAME, ALPHA, PART_FILE, Parts, part_of, read_parts
from openvla_lightning.checkpoint.released import Released
from openvla_lightning.checkpoint.tensors import dtype_problems, open_tensors
from openvla_lightning.strategy import LoRA, to_config

ADAPTER, _WEIGHTS = "lora_adapter", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Platform:
    """Constants of the released code for a robot (`prismatic/vla/constants.py`).

    Attributes:
        action_chunk: T, actions in a chunk.
        normalisation: how actions and states were scaled.
        cameras: the views, in the order of `pixel_values`.
    """

    action_chunk: int
    normalisation: Literal["quantile", "minmax"]
    cameras: tuple[str, ...]


LIBERO = Platform(8, "quantile", ("primary", "wrist"))
LIBERO_BLIND = Platform(8, "quantile", ("primary",))
"""LIBERO without proprioception, as in the paper's ablations: one camera."""
BRIDGE = Platform(5, "quantile", ("primary",))
ALOHA = Platform(25, "minmax", ("primary", "left_wrist", "right_wrist"))


def platform(action_dim: int, proprio_dim: int | None) -> Platform | None:
    """The released robot with actions and states of this width; None if there is none."""
    known = {(7, 8): LIBERO, (7, None): LIBERO_BLIND, (7, 7): BRIDGE, (14, 14): ALOHA, (14, None): ALOHA}
    return known.get((action_dim, proprio_dim))


class OFT:
    """Folders of OpenVLA-OFT: the released layout and parts, or a `lora_adapter/` and parts for a base elsewhere."""

    def recognises(self, path: Path) -> bool:
        """Whether the folder `path` holds any file of OpenVLA-OFT."""
        if not path.is_dir():
            return False
        return any(PART_FILE.fullmatch(file.name) for file in path.iterdir()) or _is_adapter(path)

    def describe(self, path: Path) -> Description:
        """The description of the released layout, extended by the names and shapes of the parts.

        Raises:
            CheckpointError: as for the released layout, and for all problems of the parts.
        """
        parts = read_parts(path)
        plain = self._adapter(path) if _is_adapter(path) else Released().describe(path)
        ours = plain.json_files.get("config.json", {}).get(OURS) or {}
        problems = list(plain.problems)
        shapes = {name: shape for name, shape in plain.shapes.items() if part_of(name, parts.film) is None}
        if plain.one_dtype[0] and not problems:  # parts may have other dtypes
            floats = {name: dtype for name, (_, dtype) in shapes.items() if dtype.is_floating_point}
            problems += dtype_problems(floats)
        vla = {**plain.vla, "proprio_dim": parts.proprio_dim}
        if parts.film:
            vla["film"] = ours.get("film", "released")
        width = parts.action_dim or _width(plain.norm_stats)
        robot = platform(width, parts.proprio_dim) if width else None
        processor = _processor(plain.processor, parts, robot, ours)
        if "action_head" in parts.files:
            head = processor["action_head"]
            vla["action_head"] = {**head, "action_chunk": head["action_chunk"] or 1}  # not used by its network
        vla = {key: value for key, value in vla.items() if value is not None}
        strategy = plain.strategy
        if parts.adapters:
            rank = parts.rank or 1
            if strategy is not None and (strategy["rank"], strategy["alpha"]) != (rank, min(rank, ALPHA)):
                problems.append(
                    f"{ADAPTER}: rank {strategy['rank']} and alpha {strategy['alpha']} are not those of the towers' "
                    f"adapters in {parts.files['vision_backbone'].name}, {rank} and {min(rank, ALPHA)}"
                )
            others = strategy["targets"] if strategy else []
            strategy = to_config(LoRA(rank, min(rank, ALPHA), targets=[*others, *parts.adapters]))
        return replace(
            plain,
            format=self,
            shapes={**shapes, **parts.shapes},
            norm_stats=_scaled(plain.norm_stats, robot),
            vla=vla,
            processor=processor,
            problems=problems,
            strategy=strategy,
            one_dtype=(False, None),
            keeps_adapters=bool(parts.adapters) and plain.base is None,
        )

    def tensors(self, description: Description) -> Iterator[dict[str, Tensor]]:
        """The released VLA's tensors that no part replaces, one shard at a time, then each part's."""
        parts = read_parts(description.path)
        if _is_adapter(description.path):
            yield read_adapter(description.path / ADAPTER).tensors()
        else:
            for tensors in Released().tensors(description):
                yield {name: tensor for name, tensor in tensors.items() if part_of(name, parts.film) is None}
        yield from parts.tensors()

    def _adapter(self, path: Path) -> Description:
        """The description of an adapter's folder; the architecture is read from its base."""
        adapter = read_adapter(path / ADAPTER)
        return Description(
            path=path,
            format=self,
            files=(path / ADAPTER / _WEIGHTS,),
            shapes={name: (tuple(tensor.shape), tensor.dtype) for name, tensor in adapter.tensors().items()},
            norm_stats=read_norm_stats(path, {}),
            strategy=to_config(LoRA(adapter.rank, adapter.alpha, targets=list(adapter.layers))),
            base=Base(adapter.base, None),
            folder=path,
        )


def _is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no merged model, which would be complete without the adapter."""
    return (folder / ADAPTER / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _width(norm_stats: Mapping[str, Any]) -> int | None:
    """D, if it is equal for all datasets; otherwise None."""
    widths = {len(stats["action"]["q01"]) for stats in norm_stats.values()}
    return widths.pop() if len(widths) == 1 else None


def _scaled(norm_stats: Mapping[str, Any], robot: Platform | None) -> dict[str, Any]:
    """Statistics with the released code's normalisation added, if it is not the default one."""
    if robot is None or robot.normalisation == "quantile":
        return dict(norm_stats)
    return {name: {"normalisation": robot.normalisation, **stats} for name, stats in norm_stats.items()}


def _processor(
    plain: Mapping[str, Any], parts: Parts, robot: Platform | None, ours: Mapping[str, Any]
) -> dict[str, Any]:
    chunk = robot.action_chunk if robot else None
    if parts.head is None:  # tokens, predicted in parallel
        head = {**plain.get("action_head", {}), "action_chunk": chunk, "parallel": True}
    else:
        names = {"l1": "L1Head", "diffusion": "DiffusionHead"}
        head = {"class": names[parts.head], "action_chunk": chunk, "action_dim": parts.action_dim}
    cameras = ours.get("cameras") or (robot.cameras if robot else ("primary",))
    return {
        **plain,
        "action_head": ours.get("action_head") or head,
        "cameras": list(cameras),
        "proprio": parts.proprio_dim is not None,
    }


@dataclass(frozen=True, slots=True)
class Adapter:
    """A `lora_adapter/` folder of peft.

    Attributes:
        path: the folder.
        base: the model it was trained on, a folder or hub id.
        rank, alpha: of all its adapters.
        layers: names of the adapted layers in a VLA, without those in towers with FiLM, which are in the vision
            backbone's own file.
    """

    path: Path
    base: str
    rank: int
    alpha: int
    layers: tuple[str, ...]

    @property
    def weights(self) -> Path:
        """The file with its tensors; older versions of peft wrote a pickle."""
        return _weights_of(self.path)

    def tensors(self) -> dict[str, Tensor]:
        """The adapters' tensors under their names in an adapted VLA."""
        return {
            f"{layer}.lora_{kind}.{ADAPTER_NAME}.weight": t for (layer, kind), t in _adapter_tensors(self.path).items()
        }


def read_adapter(folder: Path) -> Adapter:
    """The contents of `folder`, a released `lora_adapter/`.

    Raises:
        CheckpointError: the folder has problems; it lists all of them.
    """
    config = read_json(folder / "adapter_config.json")
    problems = [
        f"adapter_config.json: {key} must be a {kind.__name__}, is {config.get(key)!r}"
        for key, kind in (("r", int), ("lora_alpha", int), ("base_model_name_or_path", str))
        if not isinstance(config.get(key), kind)
    ]
    usual = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
    problems += [
        f"adapter_config.json: {key}={config[key]!r} is not supported, released adapters have {value!r}"
        for key, value in usual.items()
        if config.get(key) not in (value, None)
    ]
    tensors = _adapter_tensors(folder)
    layers = sorted({layer for layer, _ in tensors})
    problems += [f"{layer}: lacks lora_{kind}" for layer in layers for kind in "AB" if (layer, kind) not in tensors]
    problems += [
        f"{layer}: its lora_A has rank {len(tensor)}, adapter_config.json says {config.get('r')}"
        for (layer, kind), tensor in tensors.items()
        if kind == "A" and len(tensor) != config.get("r")
    ]
    if not layers:
        problems.append("adapter_model.safetensors holds no adapters")
    if problems:
        raise CheckpointError(folder, problems)
    return Adapter(folder, config["base_model_name_or_path"], config["r"], config["lora_alpha"], tuple(layers))


_ADAPTER_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def _weights_of(folder: Path) -> Path:
    pickled = folder / "adapter_model.bin"
    return pickled if pickled.is_file() and not (folder / _WEIGHTS).is_file() else folder / _WEIGHTS


def _adapter_tensors(folder: Path) -> dict[tuple[str, str], Tensor]:
    path = _weights_of(folder)
    if not path.is_file():
        raise CheckpointError(folder, [f"{path.name} is missing"])
    tensors = {}
    for key, tensor in open_tensors(path):
        if (match := _ADAPTER_KEY.fullmatch(key)) is not None:
            if not match.group(1).startswith("vision_backbone.vision_backbone."):
                tensors[match.group(1), match.group(2)] = tensor
        elif not key.endswith((".base_layer.weight", ".lm_head.weight")):  # peft copies an adapted head's own weights
            raise CheckpointError(folder, [f"{path.name}: {key} is no part of a LoRA adapter"])
    return tensors
