"""The released data pipeline, for `benchmarks/data.py --released`, which runs this with TensorFlow's own Python.

    python benchmarks/released_data.py REPO ROOT NAME SIZE AUGMENT BUFFER

It is the pipeline of `RLDSDataset` in `prismatic/vla/datasets/datasets.py`, iterated to NumPy, before tokens are made.
Its imports of the model, a logger and a part of TensorFlow Graphics are not needed and are replaced by empty modules.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from served import answer

AUGMENTED: dict[str, Any] = {
    "random_resized_crop": {"scale": [0.9, 0.9], "ratio": [1.0, 1.0]},
    "random_brightness": [0.2],
    "random_contrast": [0.8, 1.2],
    "random_saturation": [0.8, 1.2],
    "random_hue": [0.05],
}
AUGMENTED["augment_order"] = list(AUGMENTED)


def leave_out(repo: Path) -> None:
    """Replace the packages around the pipeline by empty ones."""
    for name in ("prismatic", "prismatic.vla", "prismatic.vla.datasets"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(repo / name.replace(".", "/"))]
    overwatch = ModuleType("prismatic.overwatch")
    overwatch.initialize_overwatch = logging.getLogger
    sys.modules["prismatic.overwatch"] = overwatch
    for name in ("tensorflow_graphics", "tensorflow_graphics.geometry", "tensorflow_graphics.geometry.transformation"):
        sys.modules[name] = ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def pipeline(root: str, name: str, size: int, augment: bool, buffer: int) -> Callable[[], int]:
    """A function that serves the next frame, endlessly."""
    from prismatic.vla.datasets.rlds import make_interleaved_dataset
    from prismatic.vla.datasets.rlds.oxe import configs, get_oxe_dataset_kwargs_and_weights, transforms
    from prismatic.vla.datasets.rlds.utils.data_utils import NormalizationType

    if name not in configs.OXE_DATASET_CONFIGS:  # the artificial corpus
        bridge = configs.OXE_DATASET_CONFIGS["bridge_dataset"]
        configs.OXE_DATASET_CONFIGS[name] = bridge | {
            "image_obs_keys": {"primary": "image", "secondary": None, "wrist": None}
        }
        transforms.OXE_STANDARDIZATION_TRANSFORMS[name] = None
    datasets, weights = get_oxe_dataset_kwargs_and_weights(
        Path(root),
        [(name, 1.0)],
        load_camera_views=("primary",),
        load_depth=False,
        load_proprio=False,
        load_language=True,
        action_proprio_normalization_type=NormalizationType.BOUNDS_Q99,
    )
    frames: dict[str, Any] = {"resize_size": (size, size), "num_parallel_calls": 16}
    if augment:
        frames["image_augment_kwargs"] = AUGMENTED
    dataset, _, _ = make_interleaved_dataset(
        traj_transform_kwargs={
            "window_size": 1,
            "future_action_window_size": 0,
            "skip_unlabeled": True,
            "goal_relabeling_strategy": "uniform",
        },
        frame_transform_kwargs=frames,
        dataset_kwargs_list=datasets,
        shuffle_buffer_size=buffer,
        sample_weights=weights,
        balance_weights=True,
        traj_transform_threads=1,
        traj_read_threads=1,
        train=True,
    )
    served = dataset.as_numpy_iterator()

    def serve() -> int:
        assert next(served)["observation"]["image_primary"].shape[-3:] == (size, size, 3)
        return 1

    return serve


if __name__ == "__main__":
    repo, root, name, size, augment, buffer = sys.argv[1:]
    leave_out(Path(repo))
    answer(pipeline(root, name, int(size), augment == "True", int(buffer)))
