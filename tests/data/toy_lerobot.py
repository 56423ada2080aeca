"""Small LeRobot datasets whose pictures say which step they are of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.source.lerobot import LeRobot
from openvla_lightning.data.source.lerobot.encoding import Encoding
from openvla_lightning.data.source.lerobot.metadata import Feature
from openvla_lightning.data.source.lerobot.writer import Recording, write_lerobot

LENGTHS = (5, 9, 4, 7, 11, 6, 3)
HEIGHT, WIDTH = 64, 96
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CAMERAS = {"primary": FRONT, "wrist": WRIST}
TASKS = ("öffne die Lade", "stack the cubes")
FEATURES = {
    FRONT: Feature("video", (HEIGHT, WIDTH, 3)),
    WRIST: Feature("image", (32, 32, 3)),
    "observation.state": Feature("float32", (8,)),
    "action": Feature("float32", (7,)),
    "next.done": Feature("bool", (1,)),
}


def picture(episode: int, frame: int, camera: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture that reads episode, frame and camera, each six bits high, in blocks that survive a codec."""
    bits = [(value >> bit) & 1 for value in (episode, frame, camera) for bit in range(5)] + [frame & 1]
    blocks = np.array(bits, np.uint8).reshape(4, 4)
    blocks = blocks ^ (frame & 1) * (np.add.outer(range(4), range(4)) % 2).astype(np.uint8)
    image = np.full((height, width, 3), 110, np.uint8)
    image[..., 0] = np.kron(blocks, np.ones((height // 4, width // 4), np.uint8)) * 120 + 60
    return image


def seen(image: np.ndarray) -> tuple[int, int, int]:
    """Episode, frame and camera of a picture."""
    height, width = image.shape[0] // 4, image.shape[1] // 4
    means = image[..., 0].reshape(4, height, 4, width)[:, height // 4 : -height // 4, :, width // 4 : -width // 4]
    blocks = (means.mean(axis=(1, 3)) > 120).astype(np.uint8)
    odd = int(blocks[3, 3] ^ (np.add.outer(range(4), range(4)) % 2)[3, 3]) if blocks[3, 3] else 0
    blocks = blocks ^ odd * (np.add.outer(range(4), range(4)) % 2).astype(np.uint8)
    bits = blocks.ravel()[:15].reshape(3, 5)
    episode, frame, camera = (int(sum(int(bit) << i for i, bit in enumerate(row))) for row in bits)
    return episode, frame, camera


def recording(number: int, lengths: Sequence[int] = LENGTHS) -> Recording:
    """An episode: a gripper that closes half-way, and changes of a pose that its state sums up."""
    steps, rng = lengths[number], np.random.default_rng(number)
    action = rng.normal(0, 0.05, (steps, 7)).astype(np.float32)
    action[:, 6] = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
    state = np.column_stack([np.cumsum(action, axis=0), np.zeros(steps)]).astype(np.float32)
    columns = {"observation.state": state, "action": action, "next.done": np.arange(steps) == steps - 1}
    pictures = {
        FRONT: [picture(number, step, 0) for step in range(steps)],
        WRIST: [picture(number, step, 1, 32, 32) for step in range(steps)],
    }
    return Recording(columns, pictures, [TASKS[(number + (step > 3)) % 2] for step in range(steps)])


def write(folder: Path, **options: Any) -> Path:
    """A dataset of seven episodes, three in a file."""
    told: dict[str, Any] = {"fps": 10, "episodes_per_file": 3, "workers": 0, "progress": False, "encoding": Encoding()}
    features = options.pop("features", FEATURES)
    return write_lerobot(folder, features, LENGTHS, TASKS, recording, **told | options)


def described(name: str = "toy", **options: Any) -> dict[str, Any]:
    """What a user writes about it."""
    return {"format": "lerobot", "cameras": CAMERAS, "state": ["observation.state"]} | options


def opened(root: Path, name: str = "toy", **options: Any) -> LeRobot:
    """The dataset; what `describe` knows goes there, the rest to the reader."""
    reader = {key: options.pop(key) for key in ("workers", "bad_trajectories", "check_images") if key in options}
    return LeRobot(root, name, describe(name, described(name, **options)), **reader)
