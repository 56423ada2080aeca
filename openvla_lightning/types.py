"""The dataclasses that data and model exchange. Every tensor shape is documented here, once.

Letters: B samples, V views, L text tokens (prompt, what the head writes, padding), H x W pixels, T actions in a chunk,
D action dimensions, P proprioception dimensions, K places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch

IGNORE_INDEX = -100
"""Label of a position that the loss skips (torch's own default for cross-entropy)."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The pictures, instruction and state of one moment, from a world, a robot or a dataset. Raw, in the robot's units.

    Attributes:
        images: view -> uint8 array [H, W, 3], RGB, or PIL image, of any size. A view is a camera's name (`primary`,
            `wrist`), or that of an earlier picture: `primary@-1` is one step earlier.
        instruction: the task in words.
        proprio: float32 array [P], the robot's proprioceptive state; None where it is not known.
    """

    images: Mapping[str, Any]
    instruction: str
    proprio: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One timestep of a robot demonstration, ready for a `Processor`.

    Attributes:
        observation: the recorded observation.
        action: float32 array [T, D], normalised to about [-1, 1] by the dataset's own statistics.
        dataset_name: which dataset of the mixture this came from; also its `unnorm_key`.
        number: place in the order of training; it seeds all random numbers of this sample.
        proprio: float32 array [P], the observation's state, normalised by the dataset's statistics; None: not loaded.
        padded: bool array [T], True for actions past the end of the trajectory, which the loss skips; None: no padding.
    """

    observation: Observation
    action: np.ndarray
    dataset_name: str
    number: int = 0
    proprio: np.ndarray | None = None
    padded: np.ndarray | None = None


def views_of(cameras: Sequence[str], history: int) -> tuple[str, ...]:
    """The views of `history` steps: each camera now, then each one step earlier, and so on.

    Raises:
        ValueError: for fewer than one step, no camera, or one twice.
    """
    if history < 1:
        raise ValueError(f"data.history={history}: at least the step itself, 1")
    if not cameras or len(set(cameras)) < len(cameras) or isinstance(cameras, str):
        raise ValueError(f"data.cameras={cameras}: a list of different cameras, at least one")
    return tuple(f"{camera}@-{back}" if back else camera for back in range(history) for camera in cameras)


def key_of(view: str) -> str:
    """The key of a view in worlds and requests: `image` for `primary`, `wrist_image` for `wrist`, or `image@-1`."""
    camera, back = camera_of(view)
    name = "image" if camera == "primary" else f"{camera}_image"
    return f"{name}@-{back}" if back else name


def camera_of(view: str) -> tuple[str, int]:
    """The camera of a view, and how many steps before the present one the picture was taken."""
    camera, _, back = view.partition("@-")
    return camera, int(back or 0)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Questions and answers with or without an image; a VLM learns from them before robot training.

    Attributes:
        image: uint8 array [H, W, 3] of any size, RGB; None for text alone.
        turns: (question, answer) pairs.
        dataset_name: the dataset it comes from.
        number: place in the order of training.
    """

    image: np.ndarray | None
    turns: tuple[tuple[str, str], ...]
    dataset_name: str
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The inputs of the model and the action head, in training, evaluation and acting.

    Attributes:
        pixel_values: uint8 tensor [B, 3V, H, W], RGB, one view after the other in the channels; of conversations
            without images [0, 3, H, W]. `Processor.normalise` makes float [B, 3 x towers x V, H, W] of it on the
            device, before the model or a head sees it.
        input_ids: int64 tensor [B, L]: BOS, prompt, the ids that the head writes, padding on the right.
        attention_mask: bool tensor [B, L], False on padding.
        places: int64 tensor [B, K], positions in `input_ids[:, 1:]` where the ids that the head wrote are predicted;
            the head reads these. K is the longest row's count; shorter rows are filled with other positions.
        proprio: float32 tensor [B, P], normalised; None where the model reads none.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    places: torch.Tensor
    proprio: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the same with its tensors on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor | Inputs):
                values[name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **values)

    def sent(self, device: torch.device | str) -> Self:
        """Return the same with its tensors on `device`; where that is a GPU, without waiting for it."""
        if torch.device(device).type != "cuda" or self.input_ids.is_cuda:
            return self.to(device)
        return self.pin_memory().to(device, non_blocking=True)

    def pin_memory(self) -> Self:
        """Return the same with its tensors in pinned memory; a DataLoader calls this."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor | Inputs):
                values[name] = value.pin_memory()
        return replace(self, **values)

    def rows(self, start: int, stop: int) -> Self:
        """Only the samples `start` to `stop`, with the same padding."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: dict[str, Any] = {}
        for name, value in values.items():
            cut[name] = None if value is None or isinstance(value, Inputs) else value[start:stop]
        return replace(self, **cut)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Inputs):
    """A training batch: `Processor.collate(list[Step])`, or the same of `Conversation`s.

    Attributes:
        labels: int64 tensor [B, L]: the ids to predict, and `IGNORE_INDEX` where the head wrote nothing.
        actions: float32 tensor [B, T, D], the normalised actions that the labels encode.
        padded: bool tensor [B, T], True for actions past the end of their trajectory, which the loss skips; None: no
            padding.
        dataset_names: B names, for metrics per dataset.
        numbers: B places in the order of training.
        words: a batch of conversations that is learnt together with these steps; None: no conversations.
    """

    labels: torch.Tensor
    actions: torch.Tensor
    padded: torch.Tensor | None = None
    dataset_names: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    words: "Batch | None" = None


def learnt_places(labels: torch.Tensor) -> torch.Tensor:
    """`Inputs.places`, int64 [B, K], for labels [B, L]. Computed on the host, to avoid waiting for a device."""
    learnt = labels[:, 1:] != IGNORE_INDEX
    most = int(learnt.sum(1).max()) if len(learnt) else 0
    return learnt.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A head's prediction, for metrics, samples, warnings and evaluations. It carries no gradient.

    N is the number of choices that a head makes in one row: T x D action ids for the released head.

    Attributes:
        actions: float32 tensor [B, T, D], normalised, predicted under the true past.
        targets: float32 tensor [B, T, D], the demonstrated actions as this head represents them (bin centres for ids).
        correct: bool tensor [B, N], whether each choice is the demonstrated one; None for a head without choices.
        logits: float32 tensor [B, N, ids] behind these choices.
        counted: bool tensor [B, N], which of the choices count; None: all.
    """

    actions: torch.Tensor
    targets: torch.Tensor
    correct: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    @property
    def error(self) -> torch.Tensor:
        """Absolute error of each number, float32 [B, T * D], in normalised units."""
        return (self.actions - self.targets).abs().flatten(1)

    @property
    def entropy(self) -> torch.Tensor | None:
        """Entropy of each choice in nats, float32 [B, N]; None for a head without choices."""
        if self.logits is None:
            return None
        # to look whether they are numbers would be to wait for the device
        return torch.distributions.Categorical(logits=self.logits.float(), validate_args=False).entropy()


@dataclass(frozen=True, slots=True)
class VLAOutput:
    """Output of a forward pass. S = L + P positions: BOS, P visual tokens, the other L - 1 text tokens.

    Attributes:
        logits: float32 [B, S, vocab]; with `places` [B, K, vocab].
        num_patches: P, 0 without an image.
        places: int64 [B, K], the next tokens that the logits predict (see `VLA.forward`); None: all positions.
        loss: mean cross-entropy over labelled tokens; None without labels.
        tower_features: each tower's patch features [B, P, D_tower]; this and the next two only on request.
        projector_features: visual tokens [B, P, dim].
        hidden_states: embeddings, then each layer's output [B, S, dim]; the last one after the final norm.
    """

    logits: torch.Tensor
    num_patches: int
    places: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    tower_features: list[torch.Tensor] | None = None
    projector_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None

    @property
    def next_token_logits(self) -> torch.Tensor:
        """Logits [B, L - 1, vocab] that predict `input_ids[:, 1:]`, or with `places` [B, K, vocab]."""
        return self.logits if self.places is not None else self.logits[:, self.num_patches : -1]

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Targets of `next_token_logits`, [B, L - 1] or [B, K], from `labels` [B, L]."""
        return labels[:, 1:] if self.places is None else labels[:, 1:].gather(1, self.places)
