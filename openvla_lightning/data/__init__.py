"""Robot demonstrations: RLDS datasets, their standardisation, statistics, mixture and batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from openvla_lightning.data.oxe import standardise

if TYPE_CHECKING:
    from openvla_lightning.data.conversation_datamodule import ConversationDataModule
    from openvla_lightning.data.datamodule import VLADataModule
    from openvla_lightning.data.preflight import MissingDataError

__all__ = ["ConversationDataModule", "MissingDataError", "VLADataModule", "standardise"]
_HOMES = {
    "ConversationDataModule": "conversation_datamodule",
    "MissingDataError": "preflight",
    "VLADataModule": "datamodule",
}


def __getattr__(name: str) -> Any:
    """Import a DataModule on first use, because `standardise` needs neither torch nor Lightning."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
