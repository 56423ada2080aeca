"""Freezing as data: a list of part names."""

from collections.abc import Sequence
from typing import Any

from openvla_lightning.model.vla import VLA


class TrainOnly:
    """Train the named parts and freeze the rest (paper Table 1: full, last_layer, frozen_vision, sandwich).

    Args:
        parts: names that `VLA.part` knows: `vision_backbone`, `projector`, `llm`, `llm.embed_tokens`,
            `llm.last_layer`, `llm.lm_head`.

    Modules that no released VLA has (`VLA.added`: a head's network, the proprioception's projector, FiLM) learn, too.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        if isinstance(parts, str) or not parts:
            raise ValueError(f"strategy parts must be a non-empty list of part names, got {parts!r}")
        self.parts = list(parts)

    @property
    def config(self) -> dict[str, Any]:
        """As the protocol says."""
        return {"parts": self.parts}

    @property
    def adapts(self) -> bool:
        """As the protocol says."""
        return False

    def apply(self, vla: VLA) -> None:
        """Freeze `vla`, then let the named parts learn, in float32 for any loaded dtype.

        Raises:
            KeyError: the model has no such part; the message names its parts.
        """
        vla.requires_grad_(False)
        for part in self.parts:
            for module in vla.part(part):
                module.requires_grad_(True)
        for module in vla.added():
            module.requires_grad_(True)
        for parameter in vla.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
