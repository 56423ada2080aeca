"""Training runs of the released code, for Prismatic VLMs and VLAs: RUN/config.json and RUN/checkpoints/*.pt."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from openvla_lightning.checkpoint import preprocessor
from openvla_lightning.checkpoint.architecture import ARCHITECTURES, LLM_IDS, VISION_IDS, config_problems, vla_config
from openvla_lightning.checkpoint.format import CheckpointError, Description, Shapes, read_json, read_norm_stats
from openvla_lightning.checkpoint.tensors import modern_name, open_tensors, read_pickle, shapes_of

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


_NAMES = (
    (re.compile(r"^vision_backbone\.dino_featurizer\."), "vision_backbone.featurizer."),
    (re.compile(r"^vision_backbone\.clip_featurizer\."), "vision_backbone.fused_featurizer."),
    (re.compile(r"^vision_backbone\.siglip_featurizer\."), "vision_backbone.fused_featurizer."),
    (re.compile(r"^projector\.projector\.0\."), "projector.fc1."),
    (re.compile(r"^projector\.projector\.2\."), "projector.fc2."),
    (re.compile(r"^projector\.projector\.4\."), "projector.fc3."),
    (re.compile(r"^projector\.projector\.(?=weight|bias)"), "projector.fc1."),
    (re.compile(r"^llm_backbone\.llm\."), "language_model."),
)
"""Parameter names in a training run, and in the released folders."""


class Prismatic:
    """A run folder of the released training code, or one of its `.pt` files."""

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a `.pt`, or a folder with `.pt` files in `checkpoints`."""
        return path.suffix == ".pt" or any(path.glob("checkpoints/*.pt"))

    def describe(self, path: Path) -> Description:
        """The description from the run's config and the shapes of its weights.

        Raises:
            CheckpointError: for a damaged file.
        """
        file = checkpoint_file(path)
        run = path if path.is_dir() else path.parent.parent
        shapes = shapes_of(_named(file).items())
        config, problems = _released_config(run / "config.json", shapes)
        problems = problems or config_problems(config)
        return Description(
            path=path,
            format=self,
            files=(file,),
            shapes=shapes,
            norm_stats=read_norm_stats(run, {}),
            vla={} if problems else vla_config(config),
            processor={} if problems else preprocessor.processor_arguments(run, config, {}),
            problems=problems,
            absent=() if any(name.startswith("vision_backbone.") for name in shapes) else ("vision_backbone",),
        )

    def tensors(self, description: Description) -> Iterator[dict[str, Tensor]]:
        """All tensors at once, memory-mapped from the file."""
        for path in description.files:
            yield {modern_name(name): tensor for name, tensor in _named(path).items()}


def checkpoint_file(path: Path) -> Path:
    """`path` if it is a `.pt`; for a run, its latest `.pt`."""
    if path.is_file():
        return path
    latest = path / "checkpoints" / "latest-checkpoint.pt"
    return latest if latest.is_file() else sorted(path.glob("checkpoints/*.pt"))[-1]


def training_name(name: str, towers: Sequence[str]) -> tuple[str, str]:
    """The inverse of `_NAMES`: the part of a training run that a tensor of a VLA belongs to, and its name there.

    Args:
        name: name in `VLA.state_dict()`.
        towers: names of the vision towers: `dino` and `siglip`, for example.
    """
    part, _, rest = name.partition(".")
    if part == "language_model":
        return "llm_backbone", f"llm.{rest}"
    if part == "projector":
        layer, _, parameter = rest.partition(".")
        return part, f"projector.{2 * (int(layer.removeprefix('fc')) - 1)}.{parameter}"
    place, _, rest = rest.partition(".")
    tower = "featurizer" if len(towers) == 1 else f"{towers[place == 'fused_featurizer']}_featurizer"
    return part, f"{tower}.{rest.replace('scale_factor', 'gamma')}"


def run_config(vla: Mapping[str, Any]) -> dict[str, Any]:
    """The model's entries in a run's `config.json`, from `VLA.config`.

    Raises:
        ValueError: the released code has no name for the towers or the language model, or reads them differently.
    """
    vision, llm = vla["vision_backbone"], vla["llm"]
    towers = list(vision["towers"].values())
    ids, sizes = [tower["id"].removesuffix(".webli") for tower in towers], [vision["image_size"]] * len(towers)
    named = [name for name, known in VISION_IDS.items() if known == (ids, sizes)]
    named += [name for name, known in VISION_IDS.items() if known[0] == ids]
    text = [name for name, known in LLM_IDS.items() if known == llm["name"]]
    if not named or not text:
        raise ValueError(f"the released training code has no name for {ids} with {llm['name']}")
    usual = {"fusion": "channel", "feature_layer": -2, "kind": ARCHITECTURES[len(towers)][1]}
    if other := {k: v for k, v in {**vision, **vla["projector"]}.items() if k in usual and v != usual[k]}:
        raise ValueError(f"the released training code has no name for {other}, it always takes {usual}")
    extras = [{key: value for key, value in tower.items() if key not in ("id", "act_layer")} for tower in towers]
    model: dict[str, Any] = {"vision_backbone_id": named[0], "llm_backbone_id": text[0]}
    model |= {"image_sizes": sizes, "text_config": llm["architecture"]}
    if any(extras):
        model["timm_model_kwargs"] = extras
    base = next((base for base, pair in _BASES.items() if pair == (named[0], text[0])), None)
    return {"model": model, "vla": {"base_vlm": base}}


def _named(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, {"model": {part: {name: tensor}}}, under their released names."""
    content = read_pickle(path)
    if "model" not in content:
        return dict(open_tensors(path))
    parts = content["model"]
    if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
        raise CheckpointError(path, ["expected a dictionary `model` of vision_backbone, projector and llm_backbone"])
    state = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            key = f"{part}.{name}"
            for pattern, replacement in _NAMES:
                key = pattern.sub(replacement, key)
            state[key] = tensor
    return state


def _released_config(path: Path, shapes: Shapes) -> tuple[dict[str, Any], list[str]]:
    """A released `config.json` for the run whose own is at `path`, or the reasons why there is none."""
    if not path.is_file():
        hint = "a Prismatic .pt lies in RUN/checkpoints/ beside RUN/config.json; a model of yours takes it as init_from"
        return {}, [f"there is no {path}: {hint}"]
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
        return {}, problems
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
    return config, []


def _text_config(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's config, from the shapes of its weights; the released attention heads are 128 wide.

    The released code trains with Llama 2's own `rms_norm_eps` of 1e-5, while its converted folders say 1e-6. For a
    training checkpoint, the value of the training is used.
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
