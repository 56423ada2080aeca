"""Sharded checkpoints: folders that several training processes wrote together, read by one process."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

ABOUT = "about.pt"
"""File with all contents except tensors. It is written last: a folder without it is not a checkpoint."""

_INDEX_IS_MADE_OF = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "int8", "bool"},
    "pathlib": {"PosixPath"},
}


def is_sharded(path: str | Path) -> bool:
    """Whether there is a complete sharded checkpoint at `path`."""
    return Path(path, ABOUT).is_file()


def read_about(path: str | Path) -> dict[str, Any]:
    """The checkpoint's contents without its tensors."""
    return torch.load(Path(path, ABOUT), map_location="cpu", weights_only=True)


def read_shapes(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of the model's tensors, from the index of the shards.

    Raises:
        pickle.UnpicklingError: when the index holds anything else.
    """
    stored = ShardReader(path).read_metadata().state_dict_metadata
    return {
        name.removeprefix("state_dict."): (tuple(about.size), about.properties.dtype)
        for name, about in stored.items()
        if name.startswith("state_dict.") and isinstance(about, TensorStorageMetadata)
    }


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The model's tensors, each joined from its shards; optimiser states are not read."""
    weights = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in read_shapes(path).items()}
    dcp.load({"state_dict": weights}, storage_reader=ShardReader(path), no_dist=True)
    return weights


class ShardReader(dcp.FileSystemReader):
    """Torch's reader, except that the index of the shards cannot run code when it is unpickled."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: when it holds anything else.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Index(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # so writes Python 3.11.2 a member of an enumeration
        if name not in _INDEX_IS_MADE_OF.get(module, ()):
            raise pickle.UnpicklingError(f"the index of a sharded checkpoint holds no {module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"the index of a sharded checkpoint holds no {name} of {kind}")
    return kind[name]
