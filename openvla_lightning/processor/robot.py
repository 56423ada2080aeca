"""(observation, action) -> tensors. Holds a tokenizer and image settings, no weights."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openvla_lightning.action_head.base import ActionHead
from openvla_lightning.model.vision_backbone import pixel_statistics
from openvla_lightning.plugins import USUAL_HEAD, describe, rebuild
from openvla_lightning.processor.gate import accepted
from openvla_lightning.processor.image_transform import ImageTransform, ResizeStrategy
from openvla_lightning.processor.prompt import PromptKind
from openvla_lightning.processor.text import TextProcessor
from openvla_lightning.types import Batch, Inputs, Observation, Step, views_of

ImageLike = Image.Image | NDArray[np.uint8]
Given = TypeVar("Given", bound=Inputs)


class Processor(TextProcessor):
    """Makes the model's inputs, for training and for acting, with the same settings.

    The text is BOS, the prompt, with a SentencePiece tokenizer the lone space of the released model's training
    (Llama's id 29871), then action ids and the end token; padding is on the right.

    Args:
        action_head: encodes actions.
        tokenizer: local folder or hub id of the language model's tokenizer; `tiny` needs neither.
        image_size: side of the model's square input, in pixels.
        towers: vision towers as in `VisionBackbone`; their means and stds come from timm.
        means, stds: in place of `towers`, one triple per tower.
        prompt: `pure` (openvla-7b) or `vicuna` (openvla-7b-v01).
        resize_strategy, crop_area: see `ImageTransform`.
        cameras: the model's cameras, in the order of their views.
        history: of how many steps the model sees pictures, the present one included.
        proprio: whether the model reads the robot's state.
        pad_token_id: id to pad with; None: the tokenizer's.
        max_length: longest text in tokens.
    """

    def __init__(
        self,
        action_head: ActionHead,
        tokenizer: str | Path = "tiny",
        image_size: int = 224,
        towers: Mapping[str, str | Mapping[str, Any]] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        prompt: PromptKind = "pure",
        resize_strategy: ResizeStrategy = "resize-naive",
        crop_area: float | None = None,
        cameras: Sequence[str] = ("primary",),
        history: int = 1,
        proprio: bool = False,
        pad_token_id: int | None = None,
        max_length: int = 2048,
    ) -> None:
        if (means is None) != (stds is None) or (towers is None) == (means is None):
            raise ValueError("give either towers, or both means and stds")
        if means is None or stds is None:
            means, stds = pixel_statistics(towers or {})
        super().__init__(action_head, tokenizer, prompt, pad_token_id, max_length)
        self.transform = ImageTransform(image_size, means, stds, resize_strategy, crop_area)
        self.views, self.cameras, self.history = views_of(cameras, history), tuple(cameras), history
        self.proprio = proprio

    def __repr__(self) -> str:
        return f"Processor({', '.join(f'{name}={value!r}' for name, value in self.config.items())})"

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments, including the head's."""
        return {
            "action_head": describe(self.action_head, USUAL_HEAD),
            "tokenizer": self._tokenizer_name,
            "image_size": self.transform.image_size,
            "means": self.transform.means,
            "stds": self.transform.stds,
            "prompt": self.prompt,
            "resize_strategy": self.transform.resize_strategy,
            "crop_area": self.transform.crop_area,
            "cameras": list(self.cameras),
            "history": self.history,
            "proprio": self.proprio,
            "pad_token_id": self._pad_token_id,
            "max_length": self.max_length,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> "Processor":
        """Rebuild from `config`; `changes` replace some arguments, for example `tokenizer="/path/to/folder"`."""
        arguments = {**copy.deepcopy(dict(config)), **changes}
        if (camera := arguments.pop("camera", None)) is not None:  # in checkpoints with a single camera
            arguments.setdefault("cameras", [camera])
        if isinstance(arguments["action_head"], Mapping):
            arguments["action_head"] = rebuild(arguments["action_head"], USUAL_HEAD)
        return cls(**arguments)

    @classmethod
    def from_pretrained(cls, path: str | Path, base: str | Path | None = None, **changes: Any) -> "Processor":
        """The processor of a checkpoint: a released folder or hub id, a Prismatic run, or a `.ckpt` of training.

        Args:
            path, base: as in `VLA.from_pretrained`.
            changes: arguments to replace, for example `crop_area=0.9` or `tokenizer="/path/to/folder"`.

        Raises:
            CheckpointError: when the checkpoint does not say how to preprocess, or contradicts itself.
        """
        from openvla_lightning.checkpoint.formats import describe, with_base

        return cls.from_config(with_base(describe(path).check(), base).processor, **changes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write image settings and tokenizer files in the released layout; `VLA.save_pretrained` does this, too."""
        from openvla_lightning.checkpoint.preprocessor import FILE, preprocessor_config

        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(preprocessor_config(self.config, {}), indent=2)
        (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")
        if self._tokenizer_name != "tiny":
            self.tokenizer.save_pretrained(folder)

    def collate(self, steps: Sequence[Step]) -> Batch:
        """Make a training batch.

        Raises:
            KeyError: when a step lacks a view; the message names its views.
            ValueError: when a text is longer than `max_length`, or a step lacks the proprioception.
        """
        actions = torch.from_numpy(np.stack([step.action for step in steps])).float()
        text = self._written([step.observation.instruction for step in steps], actions, actions.shape[-1])
        padded = [step.padded for step in steps if step.padded is not None]
        return Batch(
            pixel_values=self._pixels([step.observation for step in steps], [step.dataset_name for step in steps]),
            **text,
            proprio=self._states([step.proprio for step in steps]),
            actions=actions,
            padded=torch.from_numpy(np.stack(padded)) if padded else None,
            dataset_names=[step.dataset_name for step in steps],
            numbers=[step.number for step in steps],
        )

    def normalise(self, inputs: Given, dtype: torch.dtype | None = None) -> Given:
        """The same inputs with pixels normalised for each vision tower, in `dtype` (None: float32), on their device."""
        if not len(inputs.pixel_values):
            return inputs
        pixels = self.transform.normalise(inputs.pixel_values)
        return replace(inputs, pixel_values=pixels if dtype is None else pixels.to(dtype))

    @property
    def reads(self) -> dict[str, Any]:
        """The arguments of `VLADataModule` with which it serves the inputs of this processor."""
        served = {"image_size": self.transform.image_size, "cameras": self.cameras, "history": self.history}
        return {**served, "proprio": self.proprio, "action_chunk": self.action_head.action_chunk}

    @property
    def needs(self) -> str:
        """The model's inputs, in words."""
        proprio = " and is told its robot's proprioception" if self.proprio else ""
        return f"looks at {', '.join(self.views)}{proprio}"

    def check(self, observation: Observation) -> None:
        """Raise ValueError when an observation lacks an input of the model; TypeError if pictures have no names."""
        if not isinstance(observation.images, Mapping):
            kind = type(observation.images).__name__
            raise TypeError(f"the pictures of an observation are {{'{self.views[0]}': image, ...}} by view, not {kind}")
        if absent := [view for view in self.views if view not in observation.images]:
            has = ", ".join(observation.images) or "none"
            raise ValueError(f"this policy {self.needs}: there is no image {', '.join(absent)}, but {has}")
        if self.proprio and observation.proprio is None:
            raise ValueError(f"this policy {self.needs}: there is no proprio")

    def _pixels(self, observations: Sequence[Observation], owners: Sequence[str] | None = None) -> Tensor:
        """uint8 [B, 3V, H, W]."""
        images = []
        for row, observation in enumerate(observations):
            if absent := [view for view in self.views if view not in observation.images]:
                whose = "the observation" if owners is None else owners[row]
                raise KeyError(f"{whose} has no view {', '.join(absent)}; it has {', '.join(observation.images)}")
            images += [observation.images[view] for view in self.views]
        pixels = self.transform.pixels(images)
        return pixels.reshape(len(observations), -1, *pixels.shape[2:])

    def _states(self, states: Sequence[NDArray[np.float32] | None]) -> Tensor | None:
        """float32 [B, P], or None for a model that reads no state."""
        if not self.proprio:
            return None
        known = [state for state in states if state is not None]
        if len(known) < len(states):
            raise ValueError(
                "the model is told the robot's proprioception, and there is none: data.proprio=true loads it"
            )
        return torch.from_numpy(np.stack(known)).float()

    def inputs(
        self, observations: Sequence[Observation], dim: int, proprio: Sequence[NDArray[np.float32] | None] | None = None
    ) -> Inputs:
        """Inputs of a policy: pixels as uint8, and after the prompt the head's placeholders, if it writes any.

        Args:
            observations: observations with all views of the model.
            dim: D, action dimensions.
            proprio: normalised states, one for each observation, if the model reads them.

        Raises:
            ValueError: an observation lacks a view or the proprioception, an image is not valid, or `gate.accepted`
                refuses an instruction.
        """
        text = self._written([accepted(observation.instruction) for observation in observations], None, dim)
        del text["labels"]
        for observation in observations:
            self.check(observation)
        states = [None] * len(observations) if proprio is None else proprio
        return Inputs(pixel_values=self._pixels(observations), proprio=self._states(states), **text)

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        instructions: str | Sequence[str],
        padding_side: Literal["left", "right"] = "right",
        normalise: bool = True,
    ) -> dict[str, Any]:
        """Make the inputs of `VLA.generate`: `pixel_values`, `input_ids`, `attention_mask`.

        Args:
            images: one image or several: PIL, or uint8 [H, W, 3]; an array [B, H, W, 3] is a batch.
            instructions: as many as images, or a single one for all images.
            padding_side: where shorter prompts are padded; the model's answers are the same either way.
            normalise: False leaves `pixel_values` uint8 [B, 3, H, W], for `ImageTransform.normalise` on a device.

        Raises:
            ValueError: when counts differ or an image is no image.
        """
        single = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3)
        batch: list[ImageLike] = [images] if single else list(images)  # type: ignore[list-item, arg-type]
        texts = [instructions] * len(batch) if isinstance(instructions, str) else list(instructions)
        if len(texts) != len(batch) or not batch:
            raise ValueError(f"{len(batch)} images but {len(texts)} instructions: give as many of one as of the other")
        prompts = [self.prompt_ids(text) for text in texts]
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad_token_id)
        attention_mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if padding_side == "left" else slice(0, len(prompt))
            input_ids[row, place] = torch.tensor(prompt)
            attention_mask[row, place] = True
        pixels = self.transform(batch) if normalise else self.transform.pixels(batch)
        return {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": attention_mask}
