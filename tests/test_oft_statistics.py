"""Actions and proprioception scaled as the released OpenVLA-OFT code scales them, for each of its robots."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvla_lightning.statistics import DatasetStatistics, Normalisation

pytestmark = pytest.mark.golden
METHODS: dict[str, Normalisation] = {"normal": "meanstd", "bounds": "minmax", "bounds_q99": "quantile"}


def robots() -> list[Any]:
    root = Path(os.environ.get("OPENVLA_GOLDEN") or "nowhere", "oft")
    found = sorted(root.glob("*/common/norm_*.npz"))
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip("OPENVLA_GOLDEN holds no numbers of OpenVLA-OFT"))]
    return [pytest.param(path, id=f"{path.parent.parent.name}/{path.stem}") for path in found]


@pytest.fixture(params=robots())
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.parametrize(("entry", "start"), [("plain", ""), ("masked_proprio", "masked_proprio/")])
def test_training(path: Path, entry: str, start: str) -> None:
    arrays = np.load(path)
    statistics = DatasetStatistics.from_dict(json.loads(path.with_name(f"{path.stem}_stats.json").read_text())[entry])
    for name, method in METHODS.items():
        for part, raw in (("action", "raw_actions"), ("proprio", "raw_proprio")):
            expected = arrays[f"{start}train/{name}/{part}{'s' * (part == 'action')}"]
            ours = statistics.normalise(arrays[raw], method, part)  # type: ignore[arg-type]
            np.testing.assert_allclose(ours, expected, atol=3e-7, rtol=3e-7, err_msg=f"{name} {part}")


def test_acting(path: Path) -> None:
    """States as in training (where the released code leaves a constant number at -1, training says 0), actions back."""
    arrays = np.load(path)
    stats = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
    statistics, method = DatasetStatistics.from_dict(stats["plain"]), METHODS[stats["type"]]
    moves = statistics.proprio["min"] != statistics.proprio["max"]
    ours = statistics.normalise(arrays["raw_proprio"], method, "proprio")
    np.testing.assert_allclose(ours[:, moves], arrays["infer/proprio"][:, moves], atol=1e-6, rtol=0)
    assert not ours[:, ~moves].any()
    for name in ("infer/unnormalized_from_f32", "infer/unnormalized_from_f64"):
        back = statistics.unnormalise(arrays["infer/normalized_actions_f32"], method)
        np.testing.assert_allclose(back, arrays[name], atol=1e-6, rtol=0)


def test_wrong_bounds_are_noticed(path: Path) -> None:
    arrays = np.load(path)
    stats = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
    statistics, right = DatasetStatistics.from_dict(stats["plain"]), METHODS[stats["type"]]
    for wrong in {"minmax", "quantile", "meanstd"} - {right}:
        ours = statistics.normalise(arrays["raw_proprio"], wrong, "proprio")
        assert np.abs(ours - arrays[f"train/{stats['type']}/proprio"]).max() > 1e-3
        back = statistics.unnormalise(arrays["infer/normalized_actions_f32"], wrong)
        assert np.abs(back - arrays["infer/unnormalized_from_f64"]).max() > 1e-3
