"""OpenVLA on PyTorch Lightning: train, fine-tune and evaluate vision-language-action models."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openvla_lightning.actions import ActionTokenizer
    from openvla_lightning.model import VLA
    from openvla_lightning.policy import Policy
    from openvla_lightning.processor import Processor
    from openvla_lightning.statistics import DatasetStatistics

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces an absent optional kernel at every start

__version__ = "0.2.0"
__all__ = ["VLA", "ActionTokenizer", "DatasetStatistics", "Policy", "Processor", "__version__"]

_HOMES = {
    "ActionTokenizer": "actions",
    "DatasetStatistics": "statistics",
    "Policy": "policy",
    "Processor": "processor",
    "VLA": "model",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that light names do not load heavy packages."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
