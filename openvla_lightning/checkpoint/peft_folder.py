"""Adapter folders of peft, which the released fine-tuning script also writes; they need their base."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from openvla_lightning.checkpoint.format import Base, Description, read_norm_stats
from openvla_lightning.checkpoint.oft import read_adapter
from openvla_lightning.strategy import LoRA, to_config

ABOUT = "adapter_config.json"


class PeftFolder:
    """`adapter_config.json` and `adapter_model.safetensors`; the architecture is read from the base.

    The base is the one that the folder names (a folder or hub id), or `base=`. Any base with the right shapes is
    accepted, because peft stores no hash.
    """

    def recognises(self, path: Path) -> bool:
        """Whether `path` holds an adapter and no merged model."""
        return (path / ABOUT).is_file() and not (path / "config.json").is_file()

    def describe(self, path: Path) -> Description:
        """The description of the adapter's folder.

        Raises:
            CheckpointError: the adapter has problems; it lists all of them.
        """
        adapter = read_adapter(path)
        return Description(
            path=path,
            format=self,
            files=(adapter.weights,),
            shapes={name: (tuple(tensor.shape), tensor.dtype) for name, tensor in adapter.tensors().items()},
            norm_stats=read_norm_stats(path, {}),
            strategy=to_config(LoRA(adapter.rank, adapter.alpha, targets=list(adapter.layers))),
            base=Base(adapter.base, None),
            folder=path if any(path.glob("tokenizer*")) else None,
        )

    def tensors(self, description: Description) -> Iterator[dict[str, Tensor]]:
        """All of the adapters' tensors at once."""
        yield read_adapter(description.path).tensors()
