"""Training runs of the released code: what their `config.json` says, in the terms of the released layout."""

from collections.abc import Mapping
from typing import Any

from openvla_lightning.model.released import LLM_IDS, VISION_IDS
from openvla_lightning.model.source import CheckpointError, Source, read_json

_BASES = {
    "prism-dinosiglip-224px+7b": ("dinosiglip-vit-so-224px", "llama2-7b-pure"),
    "prism-dinosiglip-224px+13b": ("dinosiglip-vit-so-224px", "llama2-13b-pure"),
    "prism-dinosiglip+7b": ("dinosiglip-vit-so-384px", "llama2-7b-pure"),
    "prism-dinosiglip+13b": ("dinosiglip-vit-so-384px", "llama2-13b-pure"),
    "prism-dinosiglip-224px-controlled+7b": ("dinosiglip-vit-so-224px", "llama2-7b-pure"),
    "siglip-224px+7b": ("siglip-vit-so400m", "vicuna-v15-7b"),
    "reproduction-llava-v15+7b": ("clip-vit-l-336px", "vicuna-v15-7b"),
}
"""Released base VLM -> its vision and language backbones."""


def released_config(source: Source, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """A released `config.json` for a run folder's checkpoint.

    Raises:
        CheckpointError: when the run's config is missing or names backbones that are not known.
    """
    folder = source.path if source.path.is_dir() else source.path.parent.parent
    path = folder / "config.json"
    if not path.is_file():
        hint = "a Prismatic .pt lies in RUN/checkpoints/ beside RUN/config.json; a model of yours takes it as init_from"
        raise CheckpointError(source.path, [f"there is no {path}: {hint}"])
    run = read_json(path)
    model = run.get("model") if isinstance(run.get("model"), dict) else {}
    vla = run.get("vla") if isinstance(run.get("vla"), dict) else {}
    base = (vla or {}).get("base_vlm") or (model or {}).get("model_id") or ""
    vision, llm = _BASES.get(str(base), (None, None))
    vision = (model or {}).get("vision_backbone_id", vision)
    llm = (model or {}).get("llm_backbone_id", llm)
    problems = []
    if vision not in VISION_IDS:
        problems.append(f"{path}: unknown vision backbone {vision!r} (base {base!r}); known: {', '.join(VISION_IDS)}")
    if llm not in LLM_IDS:
        problems.append(f"{path}: unknown language model {llm!r} (base {base!r}); known: {', '.join(LLM_IDS)}")
    if problems:
        raise CheckpointError(source.path, problems)
    ids, sizes = VISION_IDS[str(vision)]
    text = {**_text_config(shapes), **((model or {}).get("text_config") or {})}
    config = {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp" if len(ids) == 2 else "no-align+gelu-mlp",
        "vision_backbone_id": "+".join(ids) if "image_sizes" in (model or {}) else vision,
        "llm_backbone_id": llm,
        "hf_llm_id": LLM_IDS[str(llm)],
        "timm_model_ids": ids,
        "timm_override_act_layers": ["quick_gelu" if "_clip_" in timm_id else None for timm_id in ids],
        "image_sizes": (model or {}).get("image_sizes", sizes),
        "use_fused_vision_backbone": len(ids) == 2,
        "pad_token_id": text["pad_token_id"],
        "text_config": text,
    }
    if kwargs := (model or {}).get("timm_model_kwargs"):
        config["timm_model_kwargs"] = kwargs
    return config


def _text_config(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's numbers, read off its weights; the released heads are 128 wide.

    The released code trains with Llama 2's own `rms_norm_eps` of 1e-5, while its converted folders say 1e-6: a
    training checkpoint follows the training.
    """
    root = "language_model.model."
    embed = shapes.get(f"{root}embed_tokens.weight")
    up = shapes.get(f"{root}layers.0.mlp.up_proj.weight")
    key = shapes.get(f"{root}layers.0.self_attn.k_proj.weight")
    layers = sum(k.startswith(f"{root}layers.") and k.endswith(".q_proj.weight") for k in shapes)
    if embed is None or up is None or key is None:
        return {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000}
    (vocab, hidden), intermediate = embed[0], up[0][0]
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 128),
        "num_key_value_heads": max(1, key[0][0] // 128),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": vocab - 64,
    }
