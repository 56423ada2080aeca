"""What is served: splits, filters, chunks."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_sets import one

from openvla_lightning.data.source.index import Index
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.data.steps import DatasetSteps


def test_chunks_as_released(each_golden: Path) -> None:
    arrays = np.load(one(each_golden / "data" / "transforms", "golden_units_*.npz"))
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

    relative_to = None

    def normalise(self, action: np.ndarray, method: str) -> np.ndarray:
        return action


def chunked(chunk: int, lengths: tuple[int, ...], chunk_end: str) -> DatasetSteps:
    """Steps of trajectories of these lengths, whose actions count through."""
    total = sum(lengths)
    source = Synthetic("toy")
    source.index = Index(
        action=np.repeat(np.arange(total, dtype=np.float32)[:, None], 7, axis=1),
        proprio=np.zeros((total, 0), np.float32),
        bounds=np.cumsum([0, *lengths]),
        split=np.zeros(len(lengths), np.int16),
        instruction=np.zeros(total, np.int32),
        images={},
        splits=("train",),
        instructions=("go",),
    )
    served = np.arange(total, dtype=np.int32)
    return DatasetSteps(source, served, Unscaled(), "quantile", chunk, chunk_end)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(12,), (3, 8, 9), (8,), (2, 3)])
def test_drop_begins_no_chunk_that_would_reach_past_the_end(lengths: tuple[int, ...]) -> None:
    steps = chunked(8, lengths, "drop")
    starts = [start + k for start, n in zip(np.cumsum([0, *lengths]), lengths, strict=False) for k in range(n - 7)]
    assert steps.steps.tolist() == starts
    actions = steps.actions(np.arange(len(steps)))
    np.testing.assert_array_equal(actions[..., 0], np.array(starts, np.float32).reshape(-1, 1) + np.arange(8))
    assert steps.padded(np.arange(len(steps))) is None
    again = pickle.loads(pickle.dumps(steps))
    np.testing.assert_array_equal(again.actions(np.arange(len(again))), actions)


def test_mask_says_which_actions_lie_past_the_end() -> None:
    steps = chunked(4, (6, 2), "mask")
    padded = steps.padded(np.arange(8))
    assert padded is not None
    assert padded.sum(1).tolist() == [0, 0, 0, 1, 2, 3, 2, 3]
    neutral = chunked(4, (6, 2), "neutral")
    np.testing.assert_array_equal(steps.actions(np.arange(8)), neutral.actions(np.arange(8)))
    assert neutral.padded(np.arange(8)) is None


def test_how_much_of_the_chunks_lies_past_the_end() -> None:
    assert chunked(4, (6, 2), "neutral").share_past_the_end(100) == (1 + 2 + 3 + 2 + 3) / 32
    assert chunked(4, (6, 5), "drop").share_past_the_end(100) == 0
    assert chunked(1, (6, 5), "neutral").share_past_the_end(100) == 0
    assert chunked(4, (2, 3), "drop").share_past_the_end(100) == 0, "no chunk at all"


@pytest.mark.golden
def test_drop_as_released_by_openvla_oft(golden: Path) -> None:
    checked = 0
    for path in sorted((golden / "oft").glob("*/common/norm_*.npz")):
        arrays = np.load(path)
        for name in sorted({key.split("/")[1] for key in arrays.files if key.startswith("chunk/")}):
            given = arrays[f"chunk/{name}/in"]
            chunk = json.loads(path.with_name(f"{path.stem}_stats.json").read_text()).get("chunk")
            lengths = [int(key.split("/")[1][1:]) for key in arrays.files if key.startswith("chunk/")]
            chunk = chunk or sorted(set(lengths))[1]  # chunk - 2, chunk and chunk + 4 steps
            steps = chunked(chunk, (2, len(given), 2), "drop")
            steps.source.index = replace(steps.source.index, action=np.pad(given, ((2, 2), (0, 0))))  # type: ignore[attr-defined]
            own = steps.actions(np.arange(len(steps)))
            if f"chunk/{name}/actions" in arrays.files:
                np.testing.assert_array_equal(own, arrays[f"chunk/{name}/actions"])
                ours = steps.steps - 2
                np.testing.assert_array_equal(ours, arrays[f"chunk/{name}/obs_timestep"][:, 0])
            else:
                assert not len(own), "the released code stops here"
            checked += 1
    assert checked >= 3
