"""Which weights learn. A strategy is applied to a built VLA, in place, before the optimiser sees it."""

from typing import Any, Protocol

from openvla_lightning import plugins
from openvla_lightning.model.vla import VLA
from openvla_lightning.strategy.lora import LoRA
from openvla_lightning.strategy.train_only import TrainOnly

__all__ = ["LoRA", "Strategy", "TrainOnly", "from_config", "to_config"]


class Strategy(Protocol):
    """What training and checkpoint loading ask of a strategy."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    @property
    def adapts(self) -> bool:
        """Whether the base stays as it was loaded under something small that learns: checkpoints hold that alone."""

    def apply(self, vla: VLA) -> None:
        """Choose which parameters of `vla` learn, in place; every other parameter stops requiring a gradient."""


USUAL = "openvla_lightning.strategy.TrainOnly"


def from_config(config: dict[str, Any]) -> Strategy:
    """Rebuild a strategy from the dictionary a checkpoint carries (see `plugins.rebuild`).

    Raises:
        ValueError: for a class that is not to be had here.
    """
    strategy: Strategy = plugins.rebuild(config, USUAL)
    return strategy


def to_config(strategy: Strategy) -> dict[str, Any]:
    """What `from_config` reads back."""
    return plugins.describe(strategy, USUAL)
