"""A trained model as a policy: image and instruction in, a robot action in physical units out."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from openvla_lightning.model.vla import VLA, floating
from openvla_lightning.processor import Processor
from openvla_lightning.statistics import DatasetStatistics, Normalisation, choose_key

ImageLike = np.ndarray | Image.Image
RELEASED_CROP = 0.9
"""Share of the image's area that models trained with the released augmentation look at (their random crops keep it)."""


class Policy:
    """Predicts actions with a VLA, preprocessing as it was trained.

        policy = Policy.from_pretrained("openvla/openvla-7b", unnorm_key="bridge_orig")
        action = policy.act(image, "pick up the can")

    Args:
        vla: the model; moved to `device` and `dtype`, unless it is quantised and hence in its place.
        processor: the one it was trained with.
        norm_stats: unnorm_key -> statistics of that dataset, as `DatasetStatistics` or in the released layout.
        unnorm_key: whose statistics turn predictions into actions, or a name that is as usual for that dataset
            (`libero_spatial` for `libero_spatial_no_noops`); None when there is one, or one was trained on last.
        normalisation: how training normalised actions: `quantile`, `minmax` or `meanstd`; None what the statistics
            say of themselves, and `quantile`, as released, where they say nothing.
        device: `auto` takes the first GPU, else the CPU.
        dtype: `auto` takes bfloat16 on a GPU and float32 on a CPU.

    Raises:
        KeyError: for an unknown or a missing unnorm_key, naming the known ones.
    """

    def __init__(
        self,
        vla: VLA,
        processor: Processor,
        norm_stats: Mapping[str, DatasetStatistics | Mapping[str, Any]],
        unnorm_key: str | None = None,
        normalisation: Normalisation | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> None:
        self.unnorm_key = choose_key(norm_stats, unnorm_key)
        stats = norm_stats[self.unnorm_key]
        self.statistics = stats if isinstance(stats, DatasetStatistics) else DatasetStatistics.from_dict(stats)
        self.normalisation = (
            normalisation or (stats.get("normalisation") if isinstance(stats, Mapping) else None) or "quantile"
        )
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.vla = (vla if vla.quantisation else vla.to(self.device, self.dtype)).eval()
        self.processor = processor
        self.provenance: dict[str, Any] = {"unnorm_key": self.unnorm_key, "normalisation": self.normalisation}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        unnorm_key: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantisation: Callable[[VLA, torch.device], VLA] | None = None,
        center_crop: bool | float | None = None,
        tokenizer: str | Path | None = None,
        base: str | Path | None = None,
    ) -> Self:
        """Load a policy.

        Args:
            path: a run or `.ckpt` of training, a Hugging Face folder or hub id, or a Prismatic run folder or `.pt`.
            unnorm_key, device, dtype: as above.
            quantisation: `Quantisation`, or what else puts a loaded model onto a device.
            center_crop: share of the image's area to look at, in the middle: 0.9, for which True stands, after training
                with the released augmentation; None as the checkpoint says.
            tokenizer: folder or hub id of the language model's tokenizer, where the checkpoint holds none.
            base: where the base of an adapter is now; None: where it was during training.

        Raises:
            FileNotFoundError: when there is nothing at `path`.
            ValueError: for a checkpoint that does not fit.
            KeyError: for an unknown or a missing unnorm_key.
        """
        from openvla_lightning.model.checkpoint import load_checkpoint

        started = time.monotonic()
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        changes: dict[str, Any] = {} if tokenizer is None else {"tokenizer": tokenizer}
        if center_crop is not None:
            changes["crop_area"] = RELEASED_CROP if center_crop is True else center_crop or None
        vla, processor, norm_stats = load_checkpoint(
            path, dtype=dtype, device=device if quantisation is None else "cpu", base=base, **changes
        )
        if quantisation is not None:
            vla = quantisation(vla, device)
        policy = cls(vla, processor, norm_stats, unnorm_key, device=device, dtype=dtype)
        policy.provenance = {
            "path": str(path),
            "sha256": fingerprint(path),
            **policy.provenance,
            "dtype": str(dtype).removeprefix("torch."),
            "quantisation": vla.quantisation,
            "device": str(device),
            "load_seconds": round(time.monotonic() - started, 1),
        }
        return policy

    def act(self, image: ImageLike | Sequence[ImageLike], instruction: str | Sequence[str]) -> np.ndarray:
        """Predict actions in the dataset's own units.

        Args:
            image: uint8 array [H, W, 3] or PIL image, RGB, of any size; or a list of them.
            instruction: what to do; or a list as long as the images.

        Returns:
            float64 [D] (D = 7 for the released models), or [B, D] for lists.

        Raises:
            TypeError: for something that is not an image, or a list of one and a single other.
            ValueError: for lists of different length, or an image of the wrong shape or dtype.
        """
        single = isinstance(instruction, str)
        if single != (isinstance(image, Image.Image) or getattr(image, "ndim", None) in (2, 3)):
            raise TypeError("give one image [H, W, 3] and one instruction, or lists of both that are equally long")
        images: list[ImageLike] = [image] if single else list(image)  # type: ignore[list-item, arg-type]
        instructions = [instruction] if isinstance(instruction, str) else list(instruction)
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} images and {len(instructions)} instructions; as many of each are needed")
        if not images:
            raise ValueError("no images to act on")
        if strangers := {type(picture).__name__ for picture in images if not isinstance(picture, ImageLike)}:
            raise TypeError(f"an image is a uint8 array [H, W, 3] or a PIL image, not {', '.join(sorted(strangers))}")
        actions = self._predict(images, instructions)
        return actions[0] if single else actions

    @torch.inference_mode()
    def _predict(self, images: list[ImageLike], instructions: list[str]) -> np.ndarray:
        inputs = {name: tensor.to(self.device) for name, tensor in self.processor(images, instructions).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        ids = self.vla.generate(**inputs, max_new_tokens=self.statistics.action_dim)
        normalised = self.processor.action_head.decode(ids).numpy()
        return self.statistics.unnormalise(normalised, method=self.normalisation)


def choose_device(device: str | torch.device) -> torch.device:
    """Resolve `auto`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve `auto` and names such as `bfloat16`.

    Raises:
        ValueError: for a name that is no floating dtype of torch.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        return floating(dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not known; use auto, float32, bfloat16 or float16")
    return dtype


def fingerprint(path: str | Path) -> str | None:
    """sha256 of a file, or of a folder's file names and hashes; None for what is not on this disk (a hub id)."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    if not path.is_dir():
        return None
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path)} {fingerprint(file)}\n".encode())
    return total.hexdigest()
