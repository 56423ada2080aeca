"""Where weights come from: files on disk, opened without trusting them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openvla_lightning.model.sharded import ABOUT, is_sharded

Kind = Literal["released", "prismatic", "lightning"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.+-]+")
_PRISMATIC_NAME = re.compile(r"[\w.-]+\+\d+b")
_PRISMATIC_HINT = """
That is the name of a Prismatic VLM. Download it where there is a network and give its folder:
  hf download TRI-ML/prismatic-vlms --include "{0}/*" --local-dir prismatic   # then prismatic/{0}"""
_DOWNLOAD = ("*.json", "*.safetensors", "*.model", "*.txt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with every problem that was found."""

    def __init__(self, path: str | Path, problems: list[str]) -> None:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more"] if len(problems) > 40 else [])
        super().__init__("\n  - ".join([f"cannot load {path}:", *shown]))
        self.problems = problems


@dataclass(frozen=True)
class Source:
    """A checkpoint that exists.

    Attributes:
        path: folder (released layout, Prismatic run) or file (`.pt`, `.ckpt`; of our runs the newest; sharded, a
            `.ckpt` is a folder).
        kind: `released` (Hugging Face layout), `prismatic` (training run of the released code), `lightning` (ours).
        weights: the files that hold tensors.
    """

    path: Path
    kind: Kind
    weights: list[Path] = field(default_factory=list)


def find_source(source: str | Path) -> Source:
    """Find out what `source` is; a hub id is downloaded unless it is in the cache.

    Raises:
        FileNotFoundError: when there is nothing.
        CheckpointError: when something is there that is no checkpoint.
    """
    check_source(source)
    path = Path(source).expanduser()
    if not path.exists():
        path = Path(snapshot_download(str(source), allow_patterns=list(_DOWNLOAD)))
    if path.is_file():
        kinds: dict[str, Kind] = {".ckpt": "lightning", ".pt": "prismatic"}
        if path.suffix not in kinds:
            raise CheckpointError(path, ["expected a folder, a .ckpt written here or a Prismatic .pt"])
        return Source(path, kinds[path.suffix], [path])
    if path.suffix == ".ckpt":
        if not is_sharded(path):
            raise CheckpointError(path, [f"there is no {ABOUT}: this sharded checkpoint was never finished"])
        return Source(path, "lightning", [path])
    written = [*path.glob("checkpoints/*.ckpt"), *path.glob("*/checkpoints/*.ckpt")]
    if ours := [file for file in written if not file.is_symlink()]:
        newest = max(ours, key=lambda file: (file.stat().st_mtime_ns, file.name))
        return Source(newest, "lightning", [newest])
    if (path / "checkpoints").is_dir() and list((path / "checkpoints").glob("*.pt")):
        return Source(path, "prismatic", [_newest_prismatic(path / "checkpoints")])
    if not (path / "config.json").is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(path, [f"there is no config.json (the folder holds {inside})"])
    return Source(path, "released", _released_files(path))


def check_source(source: str | Path) -> None:
    """Say within seconds whether `source` can be found, without loading or downloading it.

    Raises:
        FileNotFoundError: naming what is missing and where to get it.
    """
    text = str(source)
    if Path(text).expanduser().exists():
        return
    if text.startswith((".", "/", "~")) or text.endswith((".pt", ".ckpt")) or not _HUB_ID.fullmatch(text):
        hint = _PRISMATIC_HINT.format(text) if _PRISMATIC_NAME.fullmatch(text) else ""
        raise FileNotFoundError(f"there is no file or folder {text}{hint}")
    if _in_cache(text) or _on_hub(text):
        return
    raise FileNotFoundError(
        f"{text} is neither a local folder nor in the Hugging Face cache, and the hub does not answer for it.\n"
        f"Download it where there is a network (hf download {text} --local-dir DIR) and give the folder instead."
    )


def _in_cache(repository: str) -> bool:
    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    return any(folder.glob("snapshots/*/*"))


def _on_hub(repository: str) -> bool:
    import httpx

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = f"{constants.ENDPOINT}/{repository}/resolve/main/config.json"
        return httpx.head(url, timeout=5.0, follow_redirects=True).status_code == 200
    except (httpx.HTTPError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return False


def _newest_prismatic(folder: Path) -> Path:
    latest = folder / "latest-checkpoint.pt"
    return latest if latest.is_file() else sorted(folder.glob("*.pt"))[-1]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: when it is unreadable or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, [f"is not readable JSON: {error}"]) from error
    if not isinstance(value, dict):
        raise CheckpointError(path, [f"must hold a JSON object, holds a {type(value).__name__}"])
    return value


def _released_files(folder: Path) -> list[Path]:
    """The weight files of a released folder, checked against the index when there is one."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = index_map(folder).values()
        return [folder / name for name in sorted(set(names))]
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    raise CheckpointError(folder, [f"there are no weights: neither {SINGLE} nor {INDEX} nor pytorch_model.bin"])


def index_map(folder: Path) -> dict[str, str]:
    """Parameter name -> file name, from the index of a sharded folder.

    Raises:
        CheckpointError: when the index is malformed or names files that are missing or elsewhere.
    """
    path = folder / INDEX
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(path, ["weight_map must map parameter names to file names"])
    problems = []
    for name in sorted(set(mapping.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            problems.append(f"weight_map names {name!r}, which is not a .safetensors file of this folder")
        elif not (folder / name).is_file():
            problems.append(f"the shard {name} is missing")
    if problems:
        raise CheckpointError(folder, problems)
    return mapping


def tensor_shapes(source: Source) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor under its released name, read from headers alone.

    Raises:
        CheckpointError: for truncated or malformed files, or an index that disagrees with its shards.
    """
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    problems: list[str] = []
    where: dict[str, str] = {}
    for path in source.weights:
        try:
            for key, tensor in _open(path):
                if key in found:
                    problems.append(f"{key} is in both {where[key]} and {path.name}")
                found[key], where[key] = (tuple(tensor.shape), tensor.dtype), path.name
        except CheckpointError as error:
            problems += error.problems
    if len(source.weights) > 1 and not problems:
        mapping = index_map(source.path)
        problems += [
            f"{k}: the index puts it into {mapping[k]}, it is not there" for k in mapping if where.get(k) != mapping[k]
        ]
        problems += [f"{k}: in {where[k]} but not in the index" for k in where if k not in mapping]
    if problems:
        raise CheckpointError(source.path, problems)
    return found


def read_tensors(source: Source) -> Iterator[dict[str, Tensor]]:
    """Tensors under their released names, one file at a time; they live on the mapped file until copied."""
    for path in source.weights:
        yield dict(_open(path))


def _open(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(path, [f"{path.name} is truncated or no safetensors file: {error}"]) from error
    else:
        content = read_pickle(path)
        yield from (prismatic_state(path, content) if "model" in content else content).items()


def read_pickle(path: Path) -> dict[str, Any]:
    """What torch saved in `path`, unpickling tensors and plain types only, tensors left on disk until used.

    Raises:
        CheckpointError: for anything else, such as a truncated file or one that would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        problem = f"{path.name} is damaged, or holds more than tensors and plain values (nothing was run): {reason}"
        raise CheckpointError(path, [problem]) from error
    if not isinstance(content, dict):
        raise CheckpointError(path, [f"{path.name} must hold a dictionary, holds a {type(content).__name__}"])
    return content


_PRISMATIC = (
    (re.compile(r"^vision_backbone\.dino_featurizer\."), "vision_backbone.featurizer."),
    (re.compile(r"^vision_backbone\.clip_featurizer\."), "vision_backbone.fused_featurizer."),
    (re.compile(r"^vision_backbone\.siglip_featurizer\."), "vision_backbone.fused_featurizer."),
    (re.compile(r"^projector\.projector\.0\."), "projector.fc1."),
    (re.compile(r"^projector\.projector\.2\."), "projector.fc2."),
    (re.compile(r"^projector\.projector\.4\."), "projector.fc3."),
    (re.compile(r"^projector\.projector\.(?=weight|bias)"), "projector.fc1."),
    (re.compile(r"^llm_backbone\.llm\."), "language_model."),
)


def prismatic_state(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a Prismatic checkpoint, {"model": {part: {name: tensor}}}, under their released names."""
    parts = content["model"]
    if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
        raise CheckpointError(path, ["expected a dictionary `model` of vision_backbone, projector and llm_backbone"])
    state = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            key = f"{part}.{name}"
            for pattern, replacement in _PRISMATIC:
                key = pattern.sub(replacement, key)
            state[key] = tensor
    return state


def modern_name(key: str) -> str:
    """`key` with LayerScale named as released, whichever timm wrote it."""
    if key.startswith("vision_backbone.") and key.endswith((".ls1.gamma", ".ls2.gamma")):
        return key.removesuffix("gamma") + "scale_factor"
    return key
