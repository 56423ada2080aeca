"""Which weights learn. A strategy is applied to a built VLA, in place, before the optimiser sees it."""

from typing import Any, Protocol

from openvla_lightning.model.vla import VLA
from openvla_lightning.strategy.lora import LoRA
from openvla_lightning.strategy.train_only import TrainOnly

__all__ = ["LoRA", "Strategy", "TrainOnly", "from_config"]


class Strategy(Protocol):
    """What training and checkpoint loading ask of a strategy."""

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments plus the class's name: what `from_config` reads back."""

    @property
    def adapts(self) -> bool:
        """Whether the base stays as it was loaded under something small that learns: checkpoints hold that alone."""

    def apply(self, vla: VLA) -> None:
        """Choose which parameters of `vla` learn, in place; every other parameter stops requiring a gradient."""


_STRATEGIES: dict[str, type[TrainOnly] | type[LoRA]] = {"TrainOnly": TrainOnly, "LoRA": LoRA}


def from_config(config: dict[str, Any]) -> Strategy:
    """Rebuild a strategy from the dictionary a checkpoint carries.

    Raises:
        ValueError: for a name this version does not know.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in _STRATEGIES:
        raise ValueError(f"unknown strategy {name!r} in checkpoint; known: {', '.join(_STRATEGIES)}")
    return _STRATEGIES[name](**arguments)
