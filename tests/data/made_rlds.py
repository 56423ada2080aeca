"""RLDS datasets of any make: other features, words, states, images than the toy's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from openvla_lightning.data.oxe import describe
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.writer import write_rlds

F = tfds.features
SPEC = {"cameras": {"primary": "image"}}


def features(
    image: Any = None, action: Any = None, language: Any = None, metadata: dict[str, Any] | None = None
) -> Any:
    """`image`, `state`, `action` and `language_instruction` (False: none), each of the given feature."""
    seen = {"image": image or F.Image(shape=(None, None, 3)), "state": F.Tensor(shape=(3,), dtype=np.float32)}
    steps = {"observation": F.FeaturesDict(seen), "action": action or F.Tensor(shape=(7,), dtype=np.float32)}
    if language is not False:
        steps["language_instruction"] = language or F.Text()
    episode = {"steps": F.Dataset(steps)}
    return F.FeaturesDict(episode | ({"episode_metadata": F.FeaturesDict(metadata)} if metadata else {}))


def picture(shade: int, height: int = 16, width: int = 24) -> np.ndarray:
    """A gradient, so that no two places of it are alike."""
    grid = np.add.outer(np.arange(height) * 7, np.arange(width) * 3)[..., None] + np.array([0, 50, 100])
    return ((grid + shade) % 256).astype(np.uint8)


def episode(
    steps: int = 6,
    seed: int = 0,
    words: Any = "lift the cube",
    image: Callable[[int], Any] | None = None,
    action: np.ndarray | None = None,
    state: np.ndarray | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One trajectory; `words` is a list with one entry per step, or what every step says, or False."""
    rng = np.random.default_rng(seed)
    if action is None:
        action = rng.normal(size=(steps, 7)).astype(np.float32)
        action[:, 6] = rng.integers(0, 2, steps)
    rows = []
    for t in range(steps):
        seen = {
            "image": picture(20 * seed + t) if image is None else image(t),
            "state": np.zeros(3, np.float32) if state is None else state[t],
        }
        row = {"observation": seen, "action": action[t]}
        if words is not False:
            row["language_instruction"] = words[t] if isinstance(words, list) else words
        rows.append(row)
    return {"steps": rows} | ({"episode_metadata": metadata} if metadata else {})


def write(root: Path, episodes: Any, made: Any = None, name: str = "made", version: str = "1.0.0", **options) -> Path:
    """Write `episodes`, a list or one per split, as dataset `name`; return the folder of its version."""
    splits = episodes if isinstance(episodes, dict) else {"train": episodes}
    options = {"workers": 0, "progress": False} | options
    return write_rlds(
        root / name / version,
        made or features(),
        {split: len(part) for split, part in splits.items()},
        lambda split, index: splits[split][index],
        **options,
    )


def source(root: Path, name: str = "made", **options: Any) -> RLDS:
    """The dataset; what `describe` knows goes there, the rest to the reader."""
    reader = {key: options.pop(key) for key in ("workers", "bad_trajectories", "cache_dir") if key in options}
    return RLDS(root, name, describe(name, SPEC | options), **reader)


def words(source: RLDS) -> list[str]:
    """What the robot is told, step by step."""
    return [source.index.instructions[i] for i in source.index.instruction]
