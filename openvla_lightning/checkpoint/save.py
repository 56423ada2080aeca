"""Saving in the released layout, which the released code and compatible engines can load."""

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from openvla_lightning.action_head import TokenHead
from openvla_lightning.checkpoint import preprocessor
from openvla_lightning.checkpoint.architecture import OURS, released_config
from openvla_lightning.checkpoint.oft_parts import FILM_NAME, keeps_apart, part_of, read_parts, write_parts
from openvla_lightning.checkpoint.released import INDEX, SINGLE
from openvla_lightning.model.hub import TOKENIZER_FILES
from openvla_lightning.model.vision_backbone import pixel_statistics
from openvla_lightning.model.vla import VLA
from openvla_lightning.runtime.files import obey_umask
from openvla_lightning.strategy.lora import merged_state, merged_weight
from openvla_lightning.types import views_of

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from openvla_lightning.processor import Processor


def save_vla(
    vla: VLA, folder: Path, processor: "Processor | None", max_shard_size: int, dtype: torch.dtype | None = None
) -> None:
    """Write `vla` into `folder`; see `VLA.save_pretrained`.

    Raises:
        ValueError: the weights are quantised, they have several dtypes and `dtype` is None, or the released code would
            load the model and act wrongly.
    """
    _check_room(vla, processor)
    state = _released_state(vla)
    dtypes = {tensor.dtype for key, (tensor, _) in state.items() if key.endswith("weight")}
    if vla.quantisation is not None or not all(kind.is_floating_point for kind in dtypes):
        raise ValueError("quantised weights do not fit the released layout: save the model without quantisation")
    if dtype is None and len(dtypes) > 1:
        raise ValueError(f"the released layout holds weights of one floating dtype, these have {dtypes}: pass dtype")
    dtype = dtype or next(iter(dtypes))
    if vla.language_model.tied:
        del state["language_model.lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    base = vla.about.json_files
    config = released_config(vla.config, base.get("config.json", {}), dtype)
    arguments = _processor_arguments(vla, processor, config)
    config["image_resize_strategy"] = arguments["resize_strategy"]
    ours = base.get("config.json", {}).get(OURS) or {}
    if processor is not None:
        config["n_action_bins"] = arguments["action_head"].get("num_bins", config["n_action_bins"])
        config["llm_max_length"] = arguments["max_length"]
        ours = _unsaid(vla, arguments)
    if ours := {**ours, **config.get(OURS, {})}:
        config[OURS] = ours
    config["norm_stats"] = vla.norm_stats
    _save_weights(state, folder, max_shard_size, dtype)
    write_parts(vla, folder, _step(vla), dtype)
    text = config["text_config"]
    generation = {
        "_from_model_config": True,
        "bos_token_id": text.get("bos_token_id", 1),
        "eos_token_id": text.get("eos_token_id", 2),
        "pad_token_id": config["pad_token_id"],
        "transformers_version": config["transformers_version"],
    }
    files = {
        "config.json": dict(sorted(config.items())),
        "generation_config.json": {**generation, **base.get("generation_config.json", {})},
        preprocessor.FILE: preprocessor.preprocessor_config(arguments, base.get(preprocessor.FILE, {})),
        "dataset_statistics.json": vla.norm_stats,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _save_tokenizer(vla, processor, folder)
    inputs = files[preprocessor.FILE].get(OURS) or {}
    (folder / "README.md").write_text(model_card(vla, config, inputs), encoding="utf-8")


def _check_room(vla: VLA, processor: "Processor | None") -> None:
    """Refuse models that the released code would load and act wrongly with: sequential tokens beside added parts."""
    head = None if processor is None else processor.action_head
    if processor is None or type(head) is not TokenHead or getattr(head, "parallel", False):
        return
    if added := more_than_one_picture(vla, processor):
        raise ValueError(
            f"the released layout has no place for {', '.join(added)} beside tokens written one after the other: "
            "keep the checkpoint of training, which Policy.from_pretrained reads as well"
        )


def more_than_one_picture(vla: VLA, processor: "Processor") -> list[str]:
    """What a model reads besides one picture and the text, in words; empty for a model like the released ones."""
    more = (["proprio_projector"] if vla.proprio_dim is not None else []) + (["film"] if vla.film else [])
    return more + ([f"the views {', '.join(processor.views)}"] if len(processor.views) > 1 else [])


def _released_state(vla: VLA) -> "dict[str, tuple[Tensor, BaseTunerLayer | None]]":
    """The tensors of `vla` that a released VLA has, under its names, each with the layer whose adapter to merge.

    Towers with FiLM have their own file; here they are without their adapters, as in released OpenVLA-OFT folders.
    """
    film = vla.film is not None
    apart = film and keeps_apart(vla)
    state = {}
    for name, (tensor, adapter) in merged_state(vla).items():
        part = part_of(name, film)
        if part is None or (part == "vision_backbone" and FILM_NAME.search(name) is None):
            state[name] = (tensor, None if apart and part is not None else adapter)
    return state


def _unsaid(vla: VLA, arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings that names and shapes of an OpenVLA-OFT folder do not show, for its `config.json`."""
    head = arguments["action_head"]
    said: dict[str, Any] = {}
    if head.get("class", "TokenHead") != "TokenHead" or head.get("parallel"):
        said["action_head"] = head
        said["cameras"] = list(arguments.get("cameras") or ["primary"])
    if vla.film not in (None, "released"):
        said["film"] = vla.film
    return said


def _step(vla: VLA) -> str:
    """The step in the names of the parts' files that `vla` was loaded from, if they still exist."""
    if vla.about.folder is None or not vla.about.folder.is_dir():
        return "latest"
    return read_parts(vla.about.folder).step or "latest"


def _processor_arguments(vla: VLA, processor: "Processor | None", config: dict[str, Any]) -> dict[str, Any]:
    if processor is not None:
        return processor.config
    images = vla.about.json_files.get(preprocessor.FILE, {})
    means, stds = pixel_statistics(vla.vision_backbone.towers)
    return {
        "image_size": vla.vision_backbone.image_size,
        "means": images.get("means", means),
        "stds": images.get("stds", stds),
        "resize_strategy": config["image_resize_strategy"],
        **(images.get(OURS) or {}),
    }


def _save_weights(
    state: "dict[str, tuple[Tensor, BaseTunerLayer | None]]", folder: Path, max_shard_size: int, dtype: torch.dtype
) -> None:
    """Write shard by shard and merge adapters meanwhile; then replace the folder's old weights by the new ones."""
    kinds = {key: dtype if tensor.is_floating_point() else tensor.dtype for key, (tensor, _) in state.items()}
    sizes = {key: tensor.numel() * kinds[key].itemsize for key, (tensor, _) in state.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for key in state:
        if shards[-1] and size + sizes[key] > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += sizes[key]
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, keys in zip(names, shards, strict=True):
        tensors = {}
        for key in keys:
            tensor, adapter = state[key]
            tensor = tensor if adapter is None else merged_weight(adapter)
            tensors[key] = tensor.detach().to("cpu", kinds[key]).contiguous()
        try:
            save_file(tensors, folder / f"{name}.partial", metadata={"format": "pt"})
        except SafetensorError as error:  # which the disk is the cause of
            raise OSError(f"{folder / name} cannot be written: {error}") from error
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    for name in names:
        obey_umask(folder / f"{name}.partial")
        (folder / f"{name}.partial").rename(folder / name)
    if count > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(vla: VLA, processor: "Processor | None", folder: Path) -> None:
    sources = [Path(processor.config["tokenizer"])] if processor is not None else []
    sources += [vla.about.folder] if vla.about.folder is not None else []
    for source in sources:
        files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
        if files and source.resolve() == folder.resolve():
            return
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if files:
            return
    if processor is not None and processor.config["tokenizer"] != "tiny":
        processor.tokenizer.save_pretrained(folder)


def model_card(vla: VLA, config: dict[str, Any], inputs: Mapping[str, Any]) -> str:
    """README.md of a saved model: its contents, its training data, its use, and versions.

    Args:
        vla: the model.
        config: contents of config.json.
        inputs: what `preprocessor_config.json` says of cameras, history, proprioception and chunk.
    """
    parameters = sum(p.numel() for name, p in vla.named_parameters() if ".lora_" not in name)
    expressible = OURS not in config and not any(config.get("timm_model_kwargs") or [])
    rows = [
        f"| {name} | {stats.get('num_trajectories', '?')} | {stats.get('num_transitions', '?')} |"
        for name, stats in vla.norm_stats.items()
    ]
    methods = sorted({stats.get("normalisation") or "quantile" for stats in vla.norm_stats.values()}) or ["quantile"]
    lines = [
        "---",
        "library_name: openvla_lightning",
        "pipeline_tag: robotics",
        "tags: [robotics, vla, openvla]",
        "---",
        f"# A vision-language-action model of {parameters / 1e6:,.1f} M parameters",
        "",
        f"- vision: {', '.join(config['timm_model_ids'])} at {config['image_sizes'][0]} px",
        f"- language model: {config['hf_llm_id']}",
        f"- projector: {vla.projector.kind}",
        f"- weights: {config['torch_dtype']}",
        "",
        "## Use",
        "```python",
        *usage(inputs),
        "```",
        "The folder has the released OpenVLA layout"
        + ("; the released code loads it too." if expressible else ", but an architecture the released code lacks."),
        "",
        "## Action statistics",
        "| `unnorm_key` | trajectories | transitions |",
        "|---|---|---|",
        *(rows or ["| none | | |"]),
        "",
        f"Numbers are in `dataset_statistics.json`; actions are predicted normalised ({', '.join(methods)}).",
        "",
    ]
    if recipe := vla.about.recipe:
        lines += ["## Recipe", "```json", json.dumps(recipe, indent=2, default=str), "```", ""]
    return "\n".join([*lines, "## Versions", ", ".join(_versions()), ""])


def usage(inputs: Mapping[str, Any]) -> list[str]:
    """Lines of Python that ask a policy with these inputs for actions."""
    views = views_of(inputs.get("cameras", ["primary"]), inputs.get("history", 1))
    load = 'policy = Policy.from_pretrained("path/to/this/folder")'
    words = '"put the spoon on the towel"'
    if len(views) == 1 and not inputs.get("proprio") and inputs.get("action_chunk", 1) == 1:
        return ["from openvla_lightning import Policy", "", load, f"action = policy.act(image, {words})"]
    names = {view: "image" if view == "primary" else f"{re.sub(r'[^a-z0-9]+', '_', view)}_image" for view in views}
    images = ", ".join(f'"{view}": {name}' for view, name in names.items())
    proprio = ", proprio=state" if inputs.get("proprio") else ""
    return [
        "from openvla_lightning import Policy",
        "from openvla_lightning.types import Observation",
        "",
        load,
        f"seen = Observation({{{images}}}, {words}{proprio})",
        "actions = policy.act_chunk([seen])[0]  # one row for each action of the chunk",
    ]


def _versions() -> list[str]:
    versions = [f"torch {torch.__version__}"]
    for package in ("openvla-lightning", "transformers", "timm", "peft"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return versions
