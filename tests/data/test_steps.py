"""What is served: splits, filters, chunks."""

from pathlib import Path

import numpy as np
from golden_sets import one

from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.data.steps import DatasetSteps


def test_chunks_as_released(golden: Path) -> None:
    arrays = np.load(one(golden / "data" / "transforms", "golden_units_*.npz"))
    checked = 0
    for number in sorted({key.split("/")[1] for key in arrays.files if key.startswith("chunk/")}):
        case = {key.split("/")[-1]: arrays[key] for key in arrays.files if key.startswith(f"chunk/{number}/")}
        _, window, future = case["T_window_future"]
        if window != 1 or "goal_timestep" in case or bytes(case["flavour"]) != b"openvla":
            continue
        before = np.ones((2, 7), np.float32)  # another trajectory on each side
        source = Synthetic("toy")
        source.index = Index(
            action=np.concatenate([before, case["action_in"], before]),
            proprio=np.zeros((len(case["action_in"]) + 4, 0), np.float32),
            bounds=np.cumsum([0, 2, len(case["action_in"]), 2]),
            split=np.zeros(3, np.int16),
            instruction=np.zeros(len(case["action_in"]) + 4, np.int32),
            images={},
            splits=("train",),
            instructions=("go",),
        )
        served = np.arange(source.index.num_steps, dtype=np.int32)
        steps = DatasetSteps(source, served, Unscaled(), "quantile", int(future) + 1)
        ours = steps.actions(np.arange(2, 2 + len(case["action_in"])))
        np.testing.assert_array_equal(ours, case["action_out"])
        checked += 1
    assert checked >= 2


class Unscaled:
    """Statistics that leave actions alone."""

    def normalise(self, action: np.ndarray, method: str) -> np.ndarray:
        return action
