"""A strategy of the lab's own, with code."""

from typing import Any

from openvla_lightning.model.vla import VLA
from openvla_lightning.strategy import TrainOnly


class LastLayers:
    """The last layers of the language model learn, and its head.

    Args:
        count: how many layers.
    """

    adapts = False

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {"count": self.count}

    def apply(self, vla: VLA) -> None:
        """Freeze all but the last layers and the head."""
        TrainOnly(["llm.lm_head"]).apply(vla)
        for layer in vla.llm.model.layers[-self.count :]:
            layer.requires_grad_(True)
