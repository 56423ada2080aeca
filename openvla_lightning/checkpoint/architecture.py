"""`config.json` of the released layout <-> the configuration of a VLA."""

from typing import Any

import torch

from openvla_lightning.model.vision_backbone import OURS as TOWER_KEYS

VISION_IDS: dict[str, tuple[list[str], list[int]]] = {
    "clip-vit-l": (["vit_large_patch14_clip_224.openai"], [224]),
    "clip-vit-l-336px": (["vit_large_patch14_clip_336.openai"], [336]),
    "siglip-vit-so400m": (["vit_so400m_patch14_siglip_224"], [224]),
    "siglip-vit-so400m-384px": (["vit_so400m_patch14_siglip_384"], [384]),
    "dinov2-vit-l": (["vit_large_patch14_reg4_dinov2.lvd142m"], [224]),
    "dinoclip-vit-l-336px": (
        ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_large_patch14_clip_336.openai"],
        [336, 336],
    ),
    "dinosiglip-vit-so-224px": (["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"], [224, 224]),
    "dinosiglip-vit-so-384px": (["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"], [384, 384]),
}
"""Released vision_backbone_id -> timm ids and image sizes."""

LLM_IDS = {
    "llama2-7b-pure": "meta-llama/Llama-2-7b-hf",
    "llama2-13b-pure": "meta-llama/Llama-2-13b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "vicuna-v15-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-v15-13b": "lmsys/vicuna-13b-v1.5",
    "mistral-v0.1-7b-pure": "mistralai/Mistral-7B-v0.1",
    "mistral-v0.1-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "phi-2-3b": "microsoft/phi-2",
}
"""Released llm_backbone_id -> hub id."""

_MODELS = {"openvla": "OpenVLAForActionPrediction", "prismatic": "PrismaticForConditionalGeneration"}
ARCHITECTURES = {1: ("no-align+gelu-mlp", "mlp"), 2: ("no-align+fused-gelu-mlp", "fused_mlp")}
_HUB_CODE = "openvla/openvla-7b--"
AUTO_MAP = {
    "AutoConfig": f"{_HUB_CODE}configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": f"{_HUB_CODE}modeling_prismatic.OpenVLAForActionPrediction",
}
OURS = "openvla_lightning"
"""Key of `config.json` for settings that the released code has no field for."""


def vla_config(config: dict[str, Any]) -> dict[str, Any]:
    """The argument of `VLA.from_config`, from a released `config.json` without `config_problems`."""
    ids, sizes = config["timm_model_ids"], config["image_sizes"]
    extras = config.get("timm_model_kwargs") or [{}] * len(ids)
    acts = config.get("timm_override_act_layers") or [None] * len(ids)
    towers = {
        _tower_name(timm_id): {"id": timm_id, **extra, **({"act_layer": act} if act else {})}
        for timm_id, extra, act in zip(ids, extras, acts, strict=True)
    }
    text = config["text_config"]
    padded = text.get("vocab_size", 32064)
    ours = config.get(OURS) or {}
    return {
        "vision_backbone": {
            "towers": towers,
            "image_size": sizes[0],
            "fusion": ours.get("fusion", "channel"),
            "feature_layer": ours.get("feature_layer", -2),
        },
        "projector": {"kind": ours.get("projector", ARCHITECTURES[len(ids)][1])},
        "llm": {
            "name": config["hf_llm_id"],
            "architecture": dict(text),
            "vocab_size": padded - config.get("pad_to_multiple_of", 64),
        },
    }


def _tower_name(timm_id: str) -> str:
    known = ("dino", "siglip", "clip")
    return next((name for name in known if name in timm_id), timm_id.partition(".")[0])


def config_problems(config: dict[str, Any]) -> list[str]:
    """Every field of `config.json` that is missing, malformed or contradicts another."""
    problems = []
    wanted: dict[str, type] = {
        "timm_model_ids": list,
        "image_sizes": list,
        "use_fused_vision_backbone": bool,
        "vision_backbone_id": str,
        "llm_backbone_id": str,
        "hf_llm_id": str,
        "arch_specifier": str,
        "text_config": dict,
    }
    for name, expected in wanted.items():
        if not isinstance(config.get(name), expected):
            problems.append(f"config.json: {name} must be a {expected.__name__}, is {config.get(name)!r}"[:300])
    if config.get("model_type") not in _MODELS:
        problems.append(f"config.json: model_type must be one of {list(_MODELS)}, is {config.get('model_type')!r}")
    elif config.get("architectures") not in (None, [_MODELS[config["model_type"]]]):
        problems.append(f"config.json: architectures {config['architectures']!r} do not go with its model_type")
    if problems:
        return problems
    ids, sizes = config["timm_model_ids"], config["image_sizes"]
    if len(ids) not in ARCHITECTURES or len(sizes) != len(ids) or len(set(map(str, sizes))) > 1:
        problems.append(f"config.json: {len(ids)} timm_model_ids {ids} do not go with image_sizes {sizes}")
        return problems
    if not all(isinstance(size, int) and 0 < size <= 4096 for size in sizes):
        problems.append(f"config.json: image_sizes must be pixels between 1 and 4096, are {sizes}")
    if config["use_fused_vision_backbone"] != (len(ids) == 2):
        problems.append(f"config.json: use_fused_vision_backbone does not go with {len(ids)} timm_model_ids")
    for name in ("timm_model_kwargs", "timm_override_act_layers"):
        if config.get(name) is not None and (not isinstance(config[name], list) or len(config[name]) != len(ids)):
            problems.append(f"config.json: {name} must list one entry per tower, is {config[name]!r}"[:300])
    if not isinstance(config.get(OURS, {}), dict) or not all(
        isinstance(entry, dict) for entry in config.get("timm_model_kwargs") or [] if not problems
    ):
        problems.append(f"config.json: timm_model_kwargs and {OURS} must hold objects")
    known = VISION_IDS.get(config["vision_backbone_id"])
    bare = [str(timm_id).removesuffix(".webli") for timm_id in ids]
    if known is not None and (bare, sizes) != known:
        problems.append(
            f"config.json: vision_backbone_id {config['vision_backbone_id']!r} means {known}, got {(ids, sizes)}"
        )
    if config["llm_backbone_id"] in LLM_IDS and config["hf_llm_id"] != LLM_IDS[config["llm_backbone_id"]]:
        problems.append(
            f"config.json: llm_backbone_id {config['llm_backbone_id']!r} means {LLM_IDS[config['llm_backbone_id']]}, "
            f"hf_llm_id says {config['hf_llm_id']!r}"
        )
    act = [("quick_gelu" if "_clip_" in timm_id else None) for timm_id in bare]
    if known is not None and (config.get("timm_override_act_layers") or act) != act:
        problems.append(f"config.json: timm_override_act_layers must be {act} for {bare}")
    usual_arch = ARCHITECTURES[len(ids)][0].rpartition("+")[2]
    if OURS not in config and config["arch_specifier"].rpartition("+")[2] != usual_arch:
        problems.append(f"config.json: arch_specifier {config['arch_specifier']!r} does not go with {len(ids)} towers")
    return problems + _number_problems(config) + _llm_problems(config)


def _llm_problems(config: dict[str, Any]) -> list[str]:
    """Contradictions to the language model that `hf_llm_id` names, which shapes alone would not show."""
    name, text = config["hf_llm_id"], config["text_config"]
    problems: list[str] = []
    if name not in LLM_IDS.values() or "phi" in name:
        return problems
    words = text.get("vocab_size", 32064) - config.get("pad_to_multiple_of", 64)
    known = {"model_type": "mistral" if "mistral" in name else "llama", "hidden_act": "silu"}
    problems += [
        f"config.json: text_config.{field} must be {value!r} for {name}, is {text[field]!r}"
        for field, value in known.items()
        if text.get(field, value) != value
    ]
    if words != 32000:
        problems.append(f"config.json: vocab_size - pad_to_multiple_of must be the 32000 words of {name}, is {words}")
    return problems


def generation_problems(config: dict[str, Any], generation: dict[str, Any]) -> list[str]:
    """Special ids of `generation_config.json` that contradict `config.json`."""
    text = config["text_config"]
    known = {
        "bos_token_id": text.get("bos_token_id", 1),
        "eos_token_id": text.get("eos_token_id", 2),
        "pad_token_id": config.get("pad_token_id", text.get("pad_token_id")),
    }
    return [
        f"generation_config.json: {name} is {generation[name]!r}, config.json means {value!r}"
        for name, value in known.items()
        if name in generation and value is not None and generation[name] != value
    ]


def _number_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    padded, multiple = config["text_config"].get("vocab_size", 32064), config.get("pad_to_multiple_of", 64)
    bins = config.get("n_action_bins", 256)
    if not all(isinstance(number, int) for number in (padded, multiple, bins)):
        return ["config.json: text_config.vocab_size, pad_to_multiple_of and n_action_bins must be whole numbers"]
    if not 0 <= multiple < padded or not 2 <= bins <= padded - multiple:
        problems.append(
            f"config.json: {bins} action ids do not fit below vocab_size={padded} - pad_to_multiple_of={multiple}"
        )
    pads = [c.get("pad_token_id") for c in (config, config["text_config"]) if c.get("pad_token_id") is not None]
    if len(set(map(str, pads))) > 1 or any(not isinstance(pad, int) or not 0 <= pad < padded for pad in pads):
        problems.append(f"config.json: pad_token_id must be the same id below {padded} everywhere, got {pads}")
    return problems


def stated_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype of the weights according to `config.json`; None if it names no known dtype."""
    name = str(config.get("torch_dtype") or config.get("dtype") or "")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def released_config(config: dict[str, Any], base: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A released `config.json` for a VLA's `config`.

    Args:
        config: `VLA.config`.
        base: the `config.json` of the folder that the model was loaded from; its other fields are kept, but not those
            of this package. Empty for a new model.
        dtype: dtype of the weights.
    """
    vision, text = config["vision_backbone"], dict(config["llm"]["architecture"])
    towers = list(vision["towers"].values())
    ids = [tower["id"].removesuffix(".webli") for tower in towers]
    extras = [{k: v for k, v in t.items() if k not in (*TOWER_KEYS, "act_layer")} for t in towers]
    sizes = [vision["image_size"]] * len(towers)
    text["torch_dtype"] = str(dtype).removeprefix("torch.")
    projector_kind = config["projector"]["kind"]
    arch, usual_kind = ARCHITECTURES[len(towers)]
    vision_id = next((k for k, v in VISION_IDS.items() if v == (ids, sizes)), "+".join(ids))
    if base.get("timm_model_ids") is not None and _pinned(base["timm_model_ids"]) == _pinned(ids):
        ids, vision_id = base["timm_model_ids"], base["vision_backbone_id"]
    name = config["llm"]["name"]
    result: dict[str, Any] = {
        "arch_specifier": arch if projector_kind == usual_kind else f"no-align+{projector_kind}",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": AUTO_MAP,
        "hf_llm_id": name,
        "image_resize_strategy": "resize-naive",
        "image_sizes": sizes,
        "llm_backbone_id": next((k for k, v in LLM_IDS.items() if v == name), name),
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": 256,
        "output_projector_states": False,
        "pad_to_multiple_of": text["vocab_size"] - config["llm"]["vocab_size"],
        "pad_token_id": text.get("pad_token_id", 32000),
        "text_config": text,
        "timm_model_ids": ids,
        "timm_override_act_layers": [tower.get("act_layer") for tower in towers],
        "torch_dtype": text["torch_dtype"],
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": len(towers) == 2,
        "vision_backbone_id": vision_id,
    }
    if any(extras):
        result["timm_model_kwargs"] = extras
    ours = {"fusion": vision["fusion"], "feature_layer": vision["feature_layer"], "projector": projector_kind}
    if ours != {"fusion": "channel", "feature_layer": -2, "projector": usual_kind}:
        result[OURS] = ours
    kept = {"auto_map", "image_resize_strategy", "llm_max_length", "n_action_bins", "transformers_version"}
    kept |= {"hf_llm_id", "llm_backbone_id"}  # the name in use may be a local folder
    if base:
        base = {k: v for k, v in base.items() if k != OURS}
        result = {**result, **base, **{k: v for k, v in result.items() if k not in kept}}
        result = {k: v for k, v in result.items() if k != "auto_map" or "auto_map" in base}
    return dict(sorted(result.items()))


def _pinned(ids: list[str]) -> list[str]:
    return [timm_id.removesuffix(".webli") for timm_id in ids]
