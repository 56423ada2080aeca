"""The released layout: a folder with config.json, safetensors, preprocessor settings and statistics."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from openvla_lightning.checkpoint import preprocessor
from openvla_lightning.checkpoint.architecture import config_problems, generation_problems, stated_dtype, vla_config
from openvla_lightning.checkpoint.format import CheckpointError, Description, Shapes, read_json, read_norm_stats
from openvla_lightning.checkpoint.tensors import modern_name, open_tensors, shapes_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"


class Released:
    """Folders of the hub, and of `VLA.save_pretrained`."""

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a folder with a `config.json`."""
        return (path / "config.json").is_file()

    def describe(self, path: Path) -> Description:
        """The description from the JSON files, which are compared with each other and with the weights' headers.

        Raises:
            CheckpointError: for unreadable files, missing shards, or an index that contradicts them.
        """
        config = read_json(path / "config.json")
        files = weight_files(path)
        shapes = _shapes(path, files)
        names = (preprocessor.FILE, "generation_config.json")
        beside = {name: read_json(path / name) for name in names if (path / name).is_file()}
        images = beside.get(preprocessor.FILE, {})
        problems = config_problems(config) or _layer_problems(config, shapes)
        if not problems:
            problems = preprocessor.preprocessing_problems(config, images)
            problems += generation_problems(config, beside.get("generation_config.json", {}))
        return Description(
            path=path,
            format=self,
            files=files,
            shapes=shapes,
            norm_stats=read_norm_stats(path, config),
            vla={} if problems else vla_config(config),
            processor={} if problems else preprocessor.processor_arguments(path, config, images),
            problems=problems,
            json_files={"config.json": {k: v for k, v in config.items() if k != "norm_stats"}, **beside},
            folder=path,
            one_dtype=(True, stated_dtype(config)),
        )

    def tensors(self, description: Description) -> Iterator[dict[str, Tensor]]:
        """Tensors, one shard at a time."""
        for path in description.files:
            yield {modern_name(name): tensor for name, tensor in open_tensors(path)}


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a released folder, compared with the index if there is one.

    Raises:
        CheckpointError: when there are none.
    """
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        return tuple(folder / name for name in sorted(set(index_map(folder).values())))
    if (folder / _PICKLED).is_file():
        return (folder / _PICKLED,)
    if (folder / _PICKLED_INDEX).is_file():
        return tuple(folder / name for name in sorted(set(index_map(folder).values())))
    known = f"neither {SINGLE} nor {INDEX} nor {_PICKLED} nor {_PICKLED_INDEX}"
    raise CheckpointError(folder, [f"there are no weights: {known}"])


def index_map(folder: Path) -> dict[str, str]:
    """Parameter name -> file name, from the index of a sharded folder; an index of safetensors is preferred.

    Raises:
        CheckpointError: when the index is malformed or names files that are missing or elsewhere.
    """
    pickled = not (folder / INDEX).is_file()
    path, suffix = folder / (_PICKLED_INDEX if pickled else INDEX), ".bin" if pickled else ".safetensors"
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(path, ["weight_map must map parameter names to file names"])
    problems = []
    for name in sorted(set(mapping.values())):
        if Path(name).name != name or not name.endswith(suffix):
            problems.append(f"weight_map names {name!r}, which is not a {suffix} file of this folder")
        elif not (folder / name).is_file():
            problems.append(f"the shard {name} is missing")
    if problems:
        raise CheckpointError(folder, problems)
    return mapping


def _shapes(folder: Path, files: tuple[Path, ...]) -> Shapes:
    """Shapes from the headers of `files`, which must agree with the index."""
    shapes: dict[str, Any] = {}
    problems: list[str] = []
    where: dict[str, str] = {}
    for path in files:
        try:
            for key, tensor in open_tensors(path):
                if key in where:
                    problems.append(f"{key} is in both {where[key]} and {path.name}")
                shapes |= shapes_of([(key, tensor)])
                where[key] = path.name
        except CheckpointError as error:
            problems += error.problems
    if len(files) > 1 and not problems:
        mapping = index_map(folder)
        problems += [
            f"{k}: the index puts it into {mapping[k]}, it is not there" for k in mapping if where.get(k) != mapping[k]
        ]
        problems += [f"{k}: in {where[k]} but not in the index" for k in where if k not in mapping]
    if problems:
        raise CheckpointError(folder, problems)
    return shapes


def _layer_problems(config: dict[str, Any], shapes: Shapes) -> list[str]:
    """Whether the config has the weights' number of layers: building a billion claimed layers would never end."""
    layers = sum(k.startswith("language_model.model.layers.") and k.endswith("q_proj.weight") for k in shapes)
    claimed = config["text_config"].get("num_hidden_layers", 32)
    if layers and claimed != layers:
        return [f"config.json: text_config says num_hidden_layers={claimed}, the weights have {layers}"]
    return []
