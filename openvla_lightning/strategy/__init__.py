"""Strategies choose which weights learn. One is applied to a built VLA, in place, before the optimiser is built."""

from typing import Any, Protocol

from openvla_lightning import plugins
from openvla_lightning.model.vla import VLA
from openvla_lightning.strategy.lora import LoRA
from openvla_lightning.strategy.train_only import TrainOnly

__all__ = ["LoRA", "Strategy", "TrainOnly", "from_config", "to_config"]


class Strategy(Protocol):
    """The interface of a strategy for training and checkpoint loading."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    @property
    def adapts(self) -> bool:
        """Whether only small adapters learn while the base does not change; checkpoints then hold only the adapters."""

    def apply(self, vla: VLA) -> None:
        """Choose which parameters of `vla` learn, in place; every other parameter stops requiring a gradient."""


USUAL = "openvla_lightning.strategy.TrainOnly"


def from_config(config: dict[str, Any]) -> Strategy:
    """Rebuild a strategy from the dictionary in a checkpoint (see `plugins.rebuild`).

    Raises:
        ValueError: the class is not available here.
    """
    strategy: Strategy = plugins.rebuild(config, USUAL)
    return strategy


def to_config(strategy: Strategy) -> dict[str, Any]:
    """Plain data for `from_config`."""
    return plugins.describe(strategy, USUAL)
