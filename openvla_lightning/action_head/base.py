"""The interface of an action head for training, the processor and the policy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from openvla_lightning.types import Batch, Inputs, Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric

    from openvla_lightning.model.vla import VLA

Decoder = Callable[[Inputs, int, torch.Generator | None], Tensor]
"""The processor's inputs (uint8 pixels, on the CPU), D and a random generator on the CPU -> normalised actions
[B, T, D]."""

Given = TypeVar("Given", bound=Inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acting:
    """Settings of acting, for all heads.

    Attributes:
        normalise: uint8 [B, 3V, H, W] -> float [B, 3 x towers x V, H, W], on any device (`ImageTransform.normalise`).
        static: use the fast path with static shapes; False: the plain reference, against which the fast path is tested.
        compile: whether to compile the code that runs often; None: only where this is faster.
        clock: called with the name of each stage when its work has been handed to the device.
        options: the head's own options: `temperature`, number of denoising steps, ...
    """

    normalise: Callable[[Tensor], Tensor]
    static: bool = True
    compile: bool | None = None
    clock: Callable[[str], None] = lambda stage: None
    options: Mapping[str, Any] | None = None


class ActionHead(Protocol):
    """Defines how the model represents, learns and decodes actions. A head holds only plain settings and is picklable.

    A head holds no weights. `network` makes the module that it needs, which becomes `vla.action_head`,
    so that optimiser, clipping, `state_dict` and checkpoints include it.

    Attributes:
        action_chunk: T, the number of actions per call.
    """

    action_chunk: int

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments, which every checkpoint carries and `plugins.rebuild` reads."""

    def write(self, actions: Tensor | None, rows: int, dim: int, end: int) -> list[list[int]]:
        """Ids that follow each row's prompt: targets for actions [B, T, D], or placeholders when acting.

        Args:
            actions: normalised, on the CPU; None when acting.
            rows: B.
            dim: D.
            end: id of the end token, which the head writes if it needs one.

        Returns:
            B lists of any length; they are empty for a head that only reads the prompt. `Inputs.places` are the
            positions at which these ids are predicted, and `Batch.labels` are these ids.
        """

    def network(self, dim: int) -> nn.Module | None:
        """The head's own module, beside a language model that is `dim` wide; None for a head without weights."""

    def loss(self, vla: "VLA", batch: Batch) -> tuple[Tensor, Prediction]:
        """Scalar loss of a batch with normalised pixels, and the prediction."""

    def metrics(self, datasets: Sequence[str]) -> "Metric":
        """A metric over samples from these datasets, with `update(prediction, batch)`."""

    def decoder(self, vla: "VLA", acting: Acting) -> Decoder:
        """A function from inputs to normalised actions.

        Raises:
            ValueError: for an option that this head does not have.
        """


def check_chunk(action_chunk: int, action_dim: int, actions: Tensor | None, dim: int) -> None:
    """Check that actions [B, T, D] (when acting, only `dim`) fit a head of fixed size.

    Raises:
        ValueError: they do not fit; the message names the settings.
    """
    if dim != action_dim or (actions is not None and tuple(actions.shape[1:]) != (action_chunk, action_dim)):
        got = f"{dim} numbers" if actions is None else f"chunks of {list(actions.shape[1:])}"
        raise ValueError(
            f"this action head predicts {action_chunk} actions of {action_dim} numbers, the data have "
            f"{got}: set data.action_chunk and action_head.action_dim"
        )


def on_device(inputs: Given, vla: "VLA", acting: Acting) -> Given:
    """Inputs on the model's device, with normalised pixels, for `VLA.states`."""
    inputs = inputs.sent(next(vla.parameters()).device)
    return replace(inputs, pixel_values=acting.normalise(inputs.pixel_values))


def options_of(head: object, acting: Acting, known: Mapping[str, Any]) -> dict[str, Any]:
    """The head's own options: the defaults of `known`, updated with the given ones.

    Raises:
        ValueError: for an option that is not in `known`.
    """
    options = dict(acting.options or {})
    if unknown := sorted(options.keys() - known.keys()):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"{type(head).__name__} does not act with {', '.join(unknown)}: {takes}")
    return {**known, **options}
