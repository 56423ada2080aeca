"""Random steps under any dataset's name, without files."""

from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import ImageMode, Pixels, resize
from openvla_lightning.data.oxe.registry import join_action
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.index import Index
from openvla_lightning.statistics import DatasetStatistics

TRAJECTORY = 16
INSTRUCTIONS = ("pick up the cube", "open the drawer", "push the can to the left")


class Synthetic(Source):
    """Random images, actions and proprioception, the same for the same name.

    Args:
        name: the name of the dataset that this replaces.
        spec: a user's own description; only its cameras and masks are used.
        num_steps: steps in the training split; a quarter as many more are held out.
        action_dim: D.
        image_size: side of the square images, in pixels.
        proprio_dim: P.
        trajectory: steps of each trajectory.
        action_chunk: T; trajectories are at least as long.
    """

    def __init__(
        self,
        name: str,
        spec: DatasetSpec | None = None,
        num_steps: int = 256,
        action_dim: int = 7,
        image_size: int = 64,
        proprio_dim: int = 7,
        trajectory: int = TRAJECTORY,
        action_chunk: int = 1,
    ) -> None:
        trajectory = max(trajectory, action_chunk)
        if not 1 <= trajectory <= num_steps:
            raise ValueError(f"num_steps must be at least {trajectory}, one trajectory; got {num_steps}")
        self.trajectory = trajectory
        self.name, self.num_steps, self.action_dim, self.image_size = name, num_steps, action_dim, image_size
        self.proprio_dim = proprio_dim
        self.given = spec

    @cached_property
    def spec(self) -> DatasetSpec:
        """The user's own description, or one with three cameras."""
        cameras = {"primary": "image", "secondary": "image", "wrist": "image"}
        action = partial(join_action, paths=("action",))
        return self.given or DatasetSpec(name=self.name, transform=action, cameras=cameras)

    def missing(self) -> str | None:
        """None: nothing is ever missing."""
        return None

    def check(self) -> None:
        """Nothing to check."""

    def prepare(self) -> None:
        """Nothing to do."""

    @cached_property
    def index(self) -> Index:
        """Random actions in trajectories of `trajectory` steps, in splits `train` and `val`."""
        trajectories = self.num_steps // self.trajectory
        held_out = max(1, trajectories // 4)
        steps = (trajectories + held_out) * self.trajectory
        rng, states = (np.random.default_rng([*other, *self.name.encode()]) for other in ([], [1]))
        action = rng.uniform(-1, 1, (steps, self.action_dim)).astype(np.float32)
        action[:, -1] = action[:, -1] > 0
        told = rng.integers(len(INSTRUCTIONS), size=steps // self.trajectory)
        return Index(
            action=action,
            proprio=states.normal(size=(steps, self.proprio_dim)).astype(np.float32),
            bounds=np.arange(0, steps + 1, self.trajectory),
            split=np.array([0] * trajectories + [1] * held_out, np.int16),
            instruction=np.repeat(told, self.trajectory).astype(np.int32),
            images={role: np.zeros((steps, 3), np.int64) for role in self.spec.cameras},
            splits=("train", "val"),
            instructions=INSTRUCTIONS,
        )

    @cached_property
    def statistics(self) -> DatasetStatistics:
        """Statistics of the random actions."""
        return self.measure(np.arange(self.index.num_steps, dtype=np.int32))

    def measure(self, steps: NDArray[np.int32]) -> DatasetStatistics:
        """Statistics of the random actions at the given steps."""
        mask, trajectories = self.spec.action_mask(self.action_dim), np.unique(self.index.trajectory[steps])
        action, proprio = self.index.action[steps], self.index.proprio[steps]
        return DatasetStatistics.from_array(action, proprio, mask=mask, num_trajectories=len(trajectories))

    def encoded(self, role: str, step: int) -> bytes | None:
        """None: no image is stored."""
        return None

    def image(self, role: str, step: int, size: int, mode: ImageMode = "released") -> Pixels | None:
        """Noise that depends on the step and the camera."""
        pixels = self.pixels(role, step)
        return None if pixels is None else resize(pixels, size)

    def pixels(self, role: str, step: int) -> Pixels | None:
        """The same noise, [image_size, image_size, 3]."""
        if self.spec.cameras[role] is None:
            return None
        rng = np.random.default_rng([step, *role.encode()])
        return rng.integers(0, 256, (self.image_size, self.image_size, 3), dtype=np.uint8)
