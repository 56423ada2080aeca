"""Every dataset of the released code, from files on disk to normalised actions, as the released pipeline has them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_sets import cases, one, unpack
from released import normalised

from openvla_lightning.data.filters import select
from openvla_lightning.data.source.rlds import RLDS

SCHEMES = {"quantile": "bounds_q99", "minmax": "bounds", "meanstd": "normal"}
OF_QUATERNIONS = {
    "cmu_playing_with_food",
    "furniture_bench_dataset_converted_externally_to_rlds",
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
}
"""Their Euler angles are equal to a unit in the last place; every other dataset's numbers are equal bit for bit."""
WITH_OTHER_IMAGES = {"bc_z", "droid", "berkeley_rpt_converted_externally_to_rlds"}


@pytest.fixture(scope="module")
def root(each_golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small datasets in every released schema."""
    folder = tmp_path_factory.mktemp("every")
    unpack(one(each_golden / "data" / "transforms", "synthetic_rlds_*.tar.gz"), folder)
    return folder


@pytest.fixture(scope="module")
def manifest(each_golden: Path) -> dict[str, Any]:
    """What the released pipeline said of them."""
    path = one(each_golden / "data" / "transforms", "golden_transforms_*.manifest.json")
    return json.loads(path.read_text())["datasets"]


@pytest.mark.parametrize(("each_golden", "dataset"), cases(on_disk=True), indirect=["each_golden"])
def test_a_dataset_end_to_end(each_golden: Path, root: Path, manifest: dict[str, Any], dataset: str) -> None:
    facts, ulp = manifest[dataset], 1e-6 if dataset in OF_QUATERNIONS else 0
    source = RLDS(root, dataset)
    index, statistics = source.index, source.statistics
    kept = select(source, "train", val_fraction=0, noop_filter="released" if dataset != "droid" else "none")[0]
    measured = facts.get("statistics")  # the released loader refuses joint positions
    if measured:
        for part in ("action", "proprio"):
            for name, numbers in measured[part].items():
                exact = name in ("q01", "q99", "min", "max", "mask")
                np.testing.assert_allclose(
                    getattr(statistics, part)[name], numbers, rtol=0 if exact else 1e-5, atol=ulp if exact else 1e-6
                )
        assert statistics.num_transitions == measured["num_transitions"]
        assert statistics.num_trajectories == measured["num_trajectories"]
    assert [index.splits[split] for split in index.split] == [t["split"] for t in facts["trajectories"]]
    released = list(normalised(each_golden, dataset))
    yielded = [t for t in facts["trajectories"] if measured and t["split"] != "test"]
    assert len(released) == len(yielded)
    first = source.spec.drop_first
    for number, part in released:
        steps = np.arange(index.bounds[number] + first, index.bounds[number + 1])
        for ours, theirs in SCHEMES.items():
            if f"{theirs}|action" in part:
                scaled = statistics.normalise(index.action[steps], ours)
                off = {"rtol": 1e-5, "atol": 1e-5} if ours == "meanstd" else {"rtol": 0, "atol": 10 * ulp}
                np.testing.assert_allclose(scaled, part[f"{theirs}|action"], **off)
                scaled = statistics.normalise(index.proprio[steps], ours, part="proprio")
                np.testing.assert_allclose(scaled, part[f"{theirs}|proprio"], atol=1e-6, rtol=1e-5)
        words = [index.instructions[i].encode() for i in index.instruction[steps]]
        assert words == part["bounds_q99|language_instruction"].tolist()
        served = bool(set(steps.tolist()) & set(kept.tolist()))
        assert served == (any(words) and facts["trajectories"][number]["split"] == "train")


def images(source: RLDS) -> Iterator[bytes]:
    for step in range(source.index.num_steps):
        for role in source.index.images:
            if (encoded := source.encoded(role, step)) is not None:
                yield encoded


@pytest.mark.parametrize(
    ("each_golden", "dataset"),
    [case for case in cases(on_disk=True) if set(case.values) & WITH_OTHER_IMAGES],
    indirect=["each_golden"],
)
def test_the_images_of_a_dataset_are_where_the_index_says(root: Path, dataset: str) -> None:
    stored = list(images(RLDS(root, dataset)))
    assert stored
    assert all(encoded[:2] == b"\xff\xd8" or encoded[:4] == b"\x89PNG" for encoded in stored)
