"""Images and text -> the model's inputs. A processor holds a tokenizer and image settings, no weights.

Its classes are imported on first use, so that prompts need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openvla_lightning.processor.chat import ChatProcessor
    from openvla_lightning.processor.robot import Processor

__all__ = ["ChatProcessor", "Processor"]

_HOMES = {"ChatProcessor": "chat", "Processor": "robot"}


def __getattr__(name: str) -> Any:
    """Import a class of this package."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
