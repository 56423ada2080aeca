"""Changes of the mixture during training."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openvla_lightning.data.mixture import Stage, check_weights, mixture_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A change of some datasets' weights at a point of the training.

    Attributes:
        after: optimiser steps (an integer), or the share of the whole training (between 0 and 1).
        mix: dataset -> its new weight; the other datasets keep theirs.
    """

    after: float
    mix: Mapping[str, float]

    def step(self, max_steps: int) -> int:
        """The first optimiser step with the new weights.

        Raises:
            ValueError: `after` is a share, but the length of the training is not known.
        """
        if self.after >= 1:
            return int(self.after)
        if max_steps < 1:
            raise ValueError(
                f"data.curriculum: after={self.after} is a share of trainer.max_steps, which is {max_steps}; "
                "set it, or give a number of optimiser steps"
            )
        return max(1, round(self.after * max_steps))


def read_curriculum(mix: Mapping[str, float], changes: Sequence[Mapping[str, Any]] | None) -> list[Change]:
    """Check a curriculum from a YAML file: a list of `{after: ..., mix: {...}}`.

    Raises:
        ValueError: a change has another form, comes before the previous one, or leaves no dataset to draw from.
    """
    curriculum: list[Change] = []
    weights = dict(mix)
    for change in changes or []:
        if set(change) != {"after", "mix"} or not isinstance(change["mix"], Mapping):
            raise ValueError(f"data.curriculum: a change is {{after: 0.667, mix: {{dataset: weight}}}}, got {change!r}")
        after = change["after"]
        if isinstance(after, bool) or not isinstance(after, int | float) or after <= 0 or (after > 1 and after % 1):
            raise ValueError(
                f"data.curriculum: after={after!r} is neither a share of the training, between 0 and 1, "
                "nor a number of optimiser steps"
            )
        weights |= change["mix"]
        check_weights(weights)
        curriculum.append(Change(after, dict(change["mix"])))
    if len({change.after >= 1 for change in curriculum}) > 1:
        raise ValueError("data.curriculum: give every `after` as a share, or every one in optimiser steps")
    if [change.after for change in curriculum] != sorted({change.after for change in curriculum}):
        raise ValueError(
            f"data.curriculum: changes must follow each other, got {[change.after for change in curriculum]}"
        )
    return curriculum


def stages(
    mix: Mapping[str, float],
    changes: Sequence[Change],
    sizes: Mapping[str, int],
    *,
    balance: bool,
    max_steps: int,
    global_batch_size: int,
) -> list[Stage]:
    """The stages of the curriculum, in sample numbers; datasets are in the order of `sizes`."""
    weights = {name: mix.get(name, 0.0) for name in sizes}
    planned = [Stage(0, list(mixture_weights(weights, sizes, balance).values()))]
    for change in changes:
        weights |= {name: weight for name, weight in change.mix.items() if name in sizes}  # others are never drawn
        step = change.step(max_steps)
        if 0 < max_steps <= step:
            log.warning(f"data.curriculum: trainer.max_steps={max_steps} ends before the change at step {step}")
        planned.append(Stage(step * global_batch_size, list(mixture_weights(weights, sizes, balance).values())))
    return planned


def intended(stages: Sequence[Stage], samples: int) -> list[float]:
    """How many of the first `samples` samples the weights assign to each dataset."""
    ends = [*(stage.start for stage in stages[1:]), samples]
    lengths = [max(0, min(end, samples) - stage.start) for stage, end in zip(stages, ends, strict=True)]
    each = zip(*(stage.shares for stage in stages), strict=True)
    return [sum(share * length for share, length in zip(shares, lengths, strict=True)) for shares in each]
