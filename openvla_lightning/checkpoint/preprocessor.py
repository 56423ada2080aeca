"""`preprocessor_config.json` of the released layout <-> the settings of a `Processor`."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.checkpoint.architecture import OURS, VISION_IDS
from openvla_lightning.model.hub import TOKENIZER_FILES
from openvla_lightning.model.timm_models import timm
from openvla_lightning.model.vision_backbone import tower_spec
from openvla_lightning.processor.prompt import prompt_of

FILE = "preprocessor_config.json"
_HUB_CODE = "openvla/openvla-7b--processing_prismatic."
_AUTO_MAP = {
    "AutoImageProcessor": f"{_HUB_CODE}PrismaticImageProcessor",
    "AutoProcessor": f"{_HUB_CODE}PrismaticProcessor",
}


def processor_arguments(path: Path, config: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """The argument of `Processor.from_config`, from `config.json` and `preprocessor_config.json` (empty if absent).

    Args:
        path: the folder; its tokenizer files are used if there are any.
        config, images: the contents of the two files.
    """
    text = config["text_config"]
    ours = images.get(OURS) or {}
    has_tokenizer = path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES[:2])
    said = config.get(OURS) or {}
    arguments: dict[str, Any] = {
        "action_head": said.get("action_head")
        or {
            "num_bins": config.get("n_action_bins", 256),
            "vocab_size": text.get("vocab_size", 32064) - config.get("pad_to_multiple_of", 64),
            "action_chunk": ours.get("action_chunk", 1),
        },
        "tokenizer": str(path) if has_tokenizer else config["hf_llm_id"],
        "image_size": config["image_sizes"][0],
        "prompt": ours.get("prompt", prompt_of(config["llm_backbone_id"])),
        "resize_strategy": config.get("image_resize_strategy", "resize-naive"),
        "crop_area": ours.get("crop_area"),
        "cameras": said.get("cameras") or ours.get("cameras") or [ours.get("camera", "primary")],
        "history": ours.get("history", 1),
        "proprio": ours.get("proprio", False),
        "pad_token_id": config.get("pad_token_id", text.get("pad_token_id")),
        "max_length": config.get("llm_max_length", 2048),
    }
    if images:
        arguments |= {"means": images["means"], "stds": images["stds"]}
    else:
        arguments["towers"] = {str(index): timm_id for index, timm_id in enumerate(config["timm_model_ids"])}
    return arguments


def preprocessing_problems(config: dict[str, Any], images: dict[str, Any]) -> list[str]:
    """Entries of `preprocessor_config.json` that contradict `config.json` or are not valid; none for empty files."""
    if not images:
        return []
    towers, problems = len(config["timm_model_ids"]), []
    sizes = [[3, size, size] for size in config["image_sizes"]]
    if images.get("input_sizes") != sizes:
        problems.append(f"{FILE}: input_sizes are {images.get('input_sizes')}, config.json's image_sizes mean {sizes}")
    for name in ("means", "stds"):
        rows = images.get(name)
        if not isinstance(rows, list) or len(rows) != towers or not all(map(_is_triple, rows)):
            problems.append(f"{FILE}: {name} must hold three numbers for each of {towers} towers, holds {rows!r}"[:300])
    if not problems and any(value <= 0 for row in images["stds"] for value in row):
        problems.append(f"{FILE}: stds must be positive, are {images['stds']}")
    if not problems:
        problems += _pixel_problems(config, images)
    strategies = {"image_resize_strategy": config.get("image_resize_strategy")}
    flags = {"use_fused_vision_backbone": config.get("use_fused_vision_backbone")}
    for name, value in {**strategies, **flags}.items():
        if value is not None and name in images and images[name] != value:
            problems.append(f"{FILE}: {name} is {images[name]!r}, config.json says {value!r}")
    return problems


def _pixel_problems(config: dict[str, Any], images: dict[str, Any]) -> list[str]:
    """Means and stds that no known tower was trained with, or that appear twice with different values."""
    problems = []
    stated = {name: images[name] for name in ("means", "stds")}
    params = images.get("tvf_normalize_params")
    if params is not None:
        again = {f"{name}s": [p.get(name) if isinstance(p, dict) else None for p in params] for name in ("mean", "std")}
        problems += [f"{FILE}: tvf_normalize_params contradict {n}" for n in stated if not _close(stated[n], again[n])]
    if config["vision_backbone_id"] in VISION_IDS:
        known = [timm.get_pretrained_cfg(tower_spec(timm_id)["id"]) for timm_id in config["timm_model_ids"]]
        usual = {"means": [cfg.mean for cfg in known if cfg], "stds": [cfg.std for cfg in known if cfg]}
        problems += [
            f"{FILE}: {name} are {stated[name]}, {config['vision_backbone_id']} was trained with {usual[name]}"
            for name in stated
            if not _close(stated[name], usual[name])
        ]
    return problems


def _close(a: Any, b: Any) -> bool:
    try:
        return bool(np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=1e-6))
    except (TypeError, ValueError):
        return False


def _is_triple(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(isinstance(v, int | float) and math.isfinite(v) for v in row)


def preprocessor_config(arguments: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A released `preprocessor_config.json` for a `Processor.config`; other fields of `base` are kept."""
    size, means, stds = arguments["image_size"], arguments["means"], arguments["stds"]
    strategy, towers = arguments["resize_strategy"], len(means)
    letterbox = strategy == "letterbox"
    result: dict[str, Any] = {
        "auto_map": _AUTO_MAP,
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": strategy,
        "input_sizes": [[3, size, size]] * towers,
        "interpolations": ["bicubic"] * towers,
        "means": means,
        "processor_class": "PrismaticProcessor",
        "stds": stds,
        "tvf_crop_params": [{"output_size": [size, size]}] * towers,
        "tvf_do_letterbox": letterbox,
        "tvf_letterbox_fill": [int(channel * 255) for channel in means[0]] if letterbox else None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": _rounded(mean), "std": _rounded(std)}
            for mean, std in zip(means, stds, strict=True)
        ],
        "tvf_resize_params": [
            {
                "antialias": True,
                "interpolation": 3,
                "max_size": None,
                "size": size if strategy == "resize-crop" else [size, size],
            }
        ]
        * towers,
        "use_fused_vision_backbone": towers == 2,
    }
    usual: dict[str, Any] = {"prompt": "pure", "crop_area": None, "cameras": ["primary"], "history": 1}
    usual |= {"proprio": False, "action_chunk": 1}
    arguments = {"action_chunk": arguments.get("action_head", {}).get("action_chunk", 1), **arguments}
    if ours := {k: arguments[k] for k, value in usual.items() if arguments.get(k, value) != value}:
        result[OURS] = ours
    if base:
        kept = {k: v for k, v in result.items() if k not in ("auto_map", "processor_class")}
        result = {**{k: v for k, v in base.items() if k != OURS}, **kept}
    return dict(sorted(result.items()))


def _rounded(values: list[float]) -> list[float]:
    """Values rounded to float32, as in torchvision."""
    return [float(np.float32(value)) for value in values]
