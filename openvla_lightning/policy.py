"""A trained model as a policy: it takes observations and returns actions in the robot's units."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from openvla_lightning.action_head import Acting
from openvla_lightning.actions import NO_STATE, absolute
from openvla_lightning.checkpoint.disk import fingerprint
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.load import load_checkpoint
from openvla_lightning.model.parameters import choose_device, choose_dtype
from openvla_lightning.model.vla import VLA
from openvla_lightning.processor import Processor
from openvla_lightning.processor.gate import finite_state
from openvla_lightning.quantisation import Quantiser
from openvla_lightning.statistics import DatasetStatistics, Normalisation, choose_key, scale_of
from openvla_lightning.types import Observation, Prediction, Step

ImageLike = np.ndarray | Image.Image
RELEASED_CROP = 0.9
"""Share of the image's area that the random crops of the released augmentation keep."""


class Policy:
    """Predicts actions with a VLA and the preprocessing of its training. Threads may share a policy: they take turns.

        policy = Policy.from_pretrained("openvla/openvla-7b", unnorm_key="bridge_orig")
        policy.warm_up()
        action = policy.act(image, "pick up the can")

    Args:
        vla: the model; it is moved to `device` and `dtype`, unless it is quantised.
        processor: the processor of its training.
        norm_stats: unnorm_key -> statistics of that dataset, as `DatasetStatistics` or in the released layout.
        unnorm_key: whose statistics turn predictions into actions, or an alias of that dataset (`libero_spatial` for
            `libero_spatial_no_noops`). None takes the only dataset, or the one of the last training.
        normalisation: how training normalised actions: `quantile`, `minmax` or `meanstd`. None reads it from the
            statistics; if they do not say, it is `quantile`, as released.
        device: `auto` takes the first GPU, else the CPU.
        dtype: `auto` takes bfloat16 on a GPU and float32 on a CPU.
        action_ids_only: choose among the action ids only. The released code (False) chooses among all ids and turns any
            other id into the smallest or largest action. Both give the same result while the model predicts action ids.
        temperature, top_k: see `Sampling`; temperature 0 takes the most likely id, as released.
        decoding: `stepwise`, or `parallel_exact`, which guesses ids and verifies them: the same ids in fewer passes.
        seed: seed of the sampling.
        compile: whether to compile the code that runs often; None: only where this is faster.
        options: further options of the action head's decoder, such as a number of denoising steps.

    Attributes:
        history: of how many steps the policy sees pictures, the present one included.
        clock: called with the name of each stage when it ends: `preprocess`, those of the decoder, `unnormalise`.

    Raises:
        UnknownDatasetError: for an unknown or a missing unnorm_key, naming the known ones.
        ValueError: for an option that the action head does not have.
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
        action_ids_only: bool = False,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        compile: bool | None = None,
        options: Mapping[str, Any] | None = None,
        decoding: str = "stepwise",
    ) -> None:
        self.unnorm_key = choose_key(norm_stats, unnorm_key)
        self.norm_stats, self._normalisation = norm_stats, normalisation
        self._scales: dict[str, tuple[DatasetStatistics, Normalisation]] = {}
        self.statistics, self.normalisation = self.scale(self.unnorm_key)
        self.device, self.dtype = choose_device(device), choose_dtype(dtype, choose_device(device))
        self.vla = (vla if vla.quantisation else vla.to(self.device, self.dtype)).eval()
        self.processor, self.history = processor, processor.history
        named = {"action_ids_only": action_ids_only, "temperature": temperature, "top_k": top_k, "decoding": decoding}
        usual = {"action_ids_only": False, "temperature": 0.0, "top_k": None, "decoding": "stepwise"}
        self.acting = Acting(
            normalise=processor.transform.normalise,
            compile=compile,
            clock=lambda stage: self.clock(stage),
            options={**{k: v for k, v in named.items() if v != usual[k]}, **(options or {})},
        )
        self._decoder = processor.action_head.decoder(self.vla, self.acting)
        self._generator = torch.Generator().manual_seed(seed)
        self._lock = threading.Lock()
        self.clock: Callable[[str], None] = lambda stage: None
        self._made: dict[str, Any] = {}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The checkpoint and its settings, for results. This is slow, because `sha256` reads the whole checkpoint."""
        read = {"path": path, "sha256": fingerprint(path)} if (path := self._made.get("path")) else {}
        return {**read, "unnorm_key": self.unnorm_key, "normalisation": self.normalisation, **self._made}

    def scale(self, unnorm_key: str | None) -> tuple[DatasetStatistics, Normalisation]:
        """Statistics of a dataset, and how its actions were normalised; None: of the policy's own."""
        if unnorm_key is None:
            return self.statistics, self.normalisation
        key = choose_key(self.norm_stats, unnorm_key)
        if key not in self._scales:
            self._scales[key] = scale_of(self.norm_stats[key], self._normalisation)
        return self._scales[key]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        unnorm_key: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantisation: Quantiser | None = None,
        center_crop: bool | float | None = None,
        tokenizer: str | Path | None = None,
        base: str | Path | None = None,
        action_chunk: int | None = None,
        cameras: Sequence[str] | None = None,
        **options: Any,
    ) -> Self:
        """Load a policy.

        Args:
            path: a run or `.ckpt` of training, a Hugging Face folder or hub id, or a Prismatic run folder or `.pt`.
            unnorm_key, device, dtype: as above.
            quantisation: `Quantisation` or `FastQuantisation`; None: no quantisation.
            center_crop: share of the image's area to keep, around its centre. Use 0.9 (or True) after training with the
                released augmentation; None: as the checkpoint says.
            tokenizer: folder or hub id of the language model's tokenizer, if the checkpoint has none.
            base: present location of an adapter's base; None: its location during training.
            action_chunk: actions per call, for a folder of OpenVLA-OFT, which does not say it. None: as
                the checkpoint says, or as released for actions and states of this width. See `load_checkpoint`.
            cameras: cameras of the policy, in order; None: as for `action_chunk`.
            options: the other arguments of the class: `action_ids_only`, `temperature`, ...

        Raises:
            FileNotFoundError: when there is nothing at `path`.
            ValueError: the checkpoint does not fit, or this machine does not support the quantisation.
            UnknownDatasetError: for an unknown or a missing unnorm_key.
        """
        started = time.monotonic()
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        if quantisation is not None:
            quantisation.check(device, dtype)
        description = describe(path).check()
        choose_key(description.norm_stats, unnorm_key)  # before the weights, which take a minute
        changes: dict[str, Any] = {} if tokenizer is None else {"tokenizer": tokenizer}
        if center_crop is not None:
            changes["crop_area"] = RELEASED_CROP if center_crop is True else center_crop or None
        if cameras is not None:
            changes["cameras"] = list(cameras)
        place = device if quantisation is None else "cpu"
        vla, processor, norm_stats = load_checkpoint(
            description, dtype=dtype, device=place, base=base, action_chunk=action_chunk, **changes
        )
        if quantisation is not None:
            vla = quantisation(vla, device)
        policy = cls(vla, processor, norm_stats, unnorm_key, device=device, dtype=dtype, **options)
        policy._made = {
            "path": str(path),
            "dtype": str(dtype).removeprefix("torch."),
            "quantisation": vla.quantisation,
            "device": str(device),
            "load_seconds": round(time.monotonic() - started, 1),
        }
        return policy

    def act(
        self,
        image: ImageLike | Sequence[ImageLike],
        instruction: str | Sequence[str],
        unnorm_key: str | Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Predict actions in the dataset's own units.

        The last number is the gripper's (in training data 1 is open, 0 closed): the centre of the predicted bin, within
        +-0.996, neither scaled nor rounded nor converted to a robot's own convention; above 0.5 means open.

        Args:
            image: uint8 array [H, W, 3] or PIL image, RGB, of any size; or a list of them.
            instruction: what to do; or a list as long as the images.
            unnorm_key: dataset whose units to use, or a list as long as the images; None: the policy's.

        Returns:
            float64 [D] (D = 7 for the released models), or [B, D] for lists.

        Raises:
            TypeError: something is not an image, or only one of image and instruction is a list.
            ValueError: for lists of different length, or a policy that needs more than an image; and as `act_chunk`.
        """
        single = isinstance(instruction, str)
        if single != (isinstance(image, Image.Image) or getattr(image, "ndim", None) in (2, 3)):
            raise TypeError("give one image [H, W, 3] and one instruction, or lists of both that are equally long")
        images: list[ImageLike] = [image] if single else list(image)  # type: ignore[list-item, arg-type]
        instructions = [instruction] if isinstance(instruction, str) else list(instruction)
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} images and {len(instructions)} instructions; as many of each are needed")
        if len(self.processor.views) > 1 or self.processor.proprio:
            raise ValueError(f"one image is not enough for this policy, which {self.processor.needs}: ask act_chunk")
        (view,) = self.processor.views
        observations = [Observation({view: image}, text) for image, text in zip(images, instructions, strict=True)]
        actions = self.act_chunk(observations, unnorm_key)[:, 0]
        return actions[0] if single else actions

    def check(self, observation: Observation) -> None:
        """Raise ValueError when an observation lacks a view or the state that the policy needs, or has another one."""
        self.processor.check(observation)
        self._state(observation, self.statistics, self.normalisation)

    def _state(self, seen: Observation, statistics: DatasetStatistics, method: Normalisation) -> NDArray[Any] | None:
        if statistics.relative_to is not None and seen.proprio is None:
            raise ValueError(NO_STATE)
        state = seen.proprio if self.processor.proprio or statistics.relative_to is not None else None
        return None if state is None else statistics.normalise(finite_state(state), method, "proprio")

    def act_chunk(
        self, observations: Sequence[Observation], unnorm_key: str | Sequence[str | None] | None = None
    ) -> NDArray[np.float64]:
        """Predict the next actions, in the dataset's own units; see `act`.

        Args:
            observations: one per robot, with the proprioceptive state if the policy was trained with it.
            unnorm_key: dataset whose units to use, or a list with one for each robot; None: the policy's.

        Returns:
            float64 [B, T, D], T actions to execute one after the other.

        Raises:
            UnknownDatasetError: for an unknown unnorm_key, naming the known ones.
            TypeError: something is no observation, no image or no text.
            ValueError: an input of the policy is missing or wrong, or actions differ in width.
        """
        if not isinstance(observations, Sequence) or any(not isinstance(seen, Observation) for seen in observations):
            raise TypeError("give a list of Observations, one per robot: [Observation({'primary': image}, 'lift it')]")
        if not (count := len(observations)):
            raise ValueError("no images to act on")
        keys = [unnorm_key] * count if unnorm_key is None or isinstance(unnorm_key, str) else list(unnorm_key)
        if len(keys) != count:
            raise ValueError(f"{count} images and {len(keys)} unnorm_keys; give one, or as many")
        scales = [self.scale(key) for key in keys]
        if len(dims := {statistics.action_dim for statistics, _ in scales}) > 1:
            raise ValueError(f"actions {sorted(dims)} numbers wide do not fit one array: ask for them one by one")
        dim, states = dims.pop(), [self._state(seen, *scale) for seen, scale in zip(observations, scales, strict=True)]
        with self._lock:
            inputs = self.processor.inputs(observations, dim, states)
            self.clock("preprocess")
            normalised = self._decoder(inputs, dim, self._generator).cpu().double().numpy()
        rows = zip(observations, normalised, scales, strict=True)
        told = [absolute(s.unnormalise(chunk, how), s.relative_to, seen.proprio) for seen, chunk, (s, how) in rows]
        self.clock("unnormalise")
        return np.stack(told)

    @property
    def reads(self) -> dict[str, Any]:
        """The arguments of `VLADataModule` with which it serves this policy's inputs."""
        state = self.processor.proprio or self.statistics.relative_to is not None
        return {**self.processor.reads, "normalisation": self.normalisation, "proprio": state}

    def warm_up(
        self, batch_sizes: Sequence[int] = (1,), instructions: Sequence[str] = ("pick up the object",)
    ) -> float:
        """Act on black images, so that compilation does not delay the first action; return the seconds it took.

        Args:
            batch_sizes: how many robots will ask at a time; on a GPU, each power of two has its own CUDA graph.
            instructions: instructions as long as the later ones, for the same reason.
        """
        started = time.monotonic()
        black = np.zeros((*[self.processor.transform.image_size] * 2, 3), np.uint8)
        for size in batch_sizes:
            for instruction in instructions:
                self.act_chunk([self.standing(black, instruction)] * size)
        return time.monotonic() - started

    def standing(self, image: ImageLike, instruction: str) -> Observation:
        """A complete observation for the policy, made from one image and a state of zeros."""
        still = np.zeros(len(self.statistics.proprio.get("q01", ())), np.float32)
        return Observation(dict.fromkeys(self.processor.views, image), instruction, still)

    @torch.inference_mode()
    def predict(self, steps: Sequence[Step]) -> Prediction:
        """Predictions for normalised steps of known datasets, with the true past of each token, as in training."""
        batch = self.processor.collate(list(steps)).sent(self.device)
        with self._lock:
            return self.processor.action_head.loss(self.vla, self.processor.normalise(batch, self.dtype))[1]
