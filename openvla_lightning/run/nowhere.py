"""What a config names that is not on this machine, told before torch is imported."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STORED = "openvla_lightning.data.source.formats.stored"


def not_there(config: Mapping[str, Any]) -> list[str]:
    """One line for each path to weights, and for each dataset of the mixture, that is not there.

    Only what is certain: a hub id or a URL is looked for later, and so is what cannot be resolved yet. An estimate
    needs none of it.
    """
    if config.get("estimate"):
        return []
    weights, datasets = [*_weights(config)], [*_datasets(config)]
    model = config.get("model")
    start = model.get("init_from") if isinstance(model, dict) else None
    if datasets and not weights and isinstance(start, str) and not Path(start).expanduser().exists():
        datasets.append(f"model.init_from={start} is looked for when they are there")
    return [*weights, *datasets]


def _weights(config: Mapping[str, Any]) -> Iterator[str]:
    model, paths = (config.get(part) for part in ("model", "paths"))
    named = {"ckpt_path": config.get("ckpt_path")}
    if isinstance(model, dict):
        named["model.init_from"] = model.get("init_from")
    logs = Path(str(paths.get("log_dir", "runs"))) if isinstance(paths, dict) else Path("runs")
    for key, value in named.items():
        if not isinstance(value, str) or not value:
            continue
        path = Path(value).expanduser()
        local = value.startswith((".", "/", "~")) or value.endswith((".ckpt", ".pt")) or path.parts[0] == logs.name
        if not local:
            continue
        in_logs = path == logs or (key == "model.init_from" and path.is_relative_to(logs))
        if not path.exists() and not in_logs:  # of these, what to do first is said later
            yield f"{key}={value}: there is no file or folder of this name"


def _datasets(config: Mapping[str, Any]) -> Iterator[str]:
    data = config.get("data")
    if not isinstance(data, dict):
        return
    source, mix = data.get("source"), data.get("mix")
    if not isinstance(source, dict) or source.get("_target_") != STORED or not isinstance(mix, dict):
        return
    root, described = source.get("root"), data.get("datasets")
    if not isinstance(root, str) or "://" in root:
        return
    in_config = described if isinstance(described, dict) else {}
    absent = [
        name for name in mix if name not in in_config and not Path(root).expanduser().joinpath(str(name)).exists()
    ]
    problems = [problem for name in absent if (problem := _absent(str(name), root))]
    if problems:
        yield from [*problems, "Point paths.data_dir=... or OPENVLA_LIGHTNING_DATA to where the datasets are"]


def _absent(name: str, root: str) -> str | None:
    """Where a dataset was looked for and is to be had; None for what the embedded world makes by itself."""
    from openvla_lightning.data.oxe.catalogue import dataset_spec
    from openvla_lightning.data.oxe.datasets import TABLETOP

    try:
        spec = dataset_spec(name)
    except ValueError as error:
        return str(error)
    return None if spec.where == TABLETOP else f"{name}: no {Path(root, name)}. Get it: {spec.to_be_had(name, root)}"
