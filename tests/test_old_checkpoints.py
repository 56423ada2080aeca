"""Checkpoints of every kind, made by earlier code, load through the public faces and answer as they did then.

What they are, and how they were made: golden/README.md. A test that fails here means that somebody's checkpoint no
longer loads, or acts differently: mend the reading, not the file.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_scripts
from golden_sets import unpack
from PIL import Image
from torch.distributed.checkpoint.metadata import TensorProperties

from openvla_lightning import VLA, Policy, Processor
from openvla_lightning.checkpoint.export import export

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
RECORDED: dict[str, Any] = json.loads((CHECKPOINTS / "answers.json").read_text())
SAYS_256_BINS = "bins_128_released"
"""An export by the code of then, which wrote `n_action_bins: 256` whatever the head had: nobody can know better."""

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is kept packed because it is many small files, or mostly noughts."""
    folder = tmp_path_factory.mktemp("unpacked")
    for packed in CHECKPOINTS.glob("*.tar.gz"):
        unpack(packed, folder)
    return folder


@pytest.fixture
def path(name: str, unpacked: Path) -> Path:
    if name == "sharded.ckpt" and "strides" not in TensorProperties.__dataclass_fields__:
        pytest.skip("sharded.ckpt is of a newer torch, whose description of shards this one cannot read")
    return unpacked / name if (unpacked / name).exists() else CHECKPOINTS / name


@pytest.fixture
def recorded(name: str) -> dict[str, Any]:
    """The ids and actions of then, and what to load with."""
    return RECORDED["answers"][name]


@pytest.fixture
def base(recorded: dict[str, Any]) -> Path | None:
    return CHECKPOINTS / recorded["base"] if recorded["base"] else None


def requests() -> tuple[list[np.ndarray], list[str]]:
    asked = RECORDED["requests"]
    pictures = [np.asarray(Image.open(CHECKPOINTS / f"picture_{request['picture']}.png")) for request in asked]
    return pictures, [request["instruction"] for request in asked]


def answers(vla: VLA, processor: Processor, count: int) -> list[list[int]]:
    return vla.generate(**processor(*requests()), max_new_tokens=count).tolist()


@pytest.mark.parametrize("name", RECORDED["answers"])
def test_model_and_processor_give_the_same_ids(path: Path, recorded: dict[str, Any], base: Path | None) -> None:
    changes = {name: recorded[name] for name in ("tokenizer",) if name in recorded}
    vla, processor = VLA.from_pretrained(path, base=base), Processor.from_pretrained(path, **changes)
    assert {parameter.dtype for parameter in vla.parameters()} == {torch.float32}
    assert answers(vla, processor, len(recorded["ids"][0])) == recorded["ids"]


@pytest.mark.parametrize(
    "name",
    [name for name, recorded in RECORDED["answers"].items() if "actions" in recorded and name != SAYS_256_BINS],
)
def test_policy_gives_the_same_actions(path: Path, recorded: dict[str, Any], base: Path | None) -> None:
    options = {name: recorded[name] for name in ("tokenizer", "unnorm_key") if name in recorded}
    policy = Policy.from_pretrained(path, device="cpu", dtype="float32", base=base, **options)
    assert answers(policy.vla, policy.processor, len(recorded["ids"][0])) == recorded["ids"]
    np.testing.assert_allclose(policy.act(*requests()), recorded["actions"], rtol=0, atol=1e-12)


def test_an_export_made_now_keeps_the_bins_of_its_checkpoint(tmp_path: Path) -> None:
    recorded = RECORDED["answers"][SAYS_256_BINS]
    export(CHECKPOINTS / "bins_128.ckpt", tmp_path / "exported")
    options = {name: recorded[name] for name in ("tokenizer", "unnorm_key") if name in recorded}
    policy = Policy.from_pretrained(tmp_path / "exported", device="cpu", dtype="float32", **options)
    np.testing.assert_allclose(policy.act(*requests()), recorded["actions"], rtol=0, atol=1e-12)


def test_answers_depend_on_all_that_is_asked() -> None:
    """Otherwise a model that ignores its picture or its instruction would pass."""
    for name, recorded in RECORDED["answers"].items():
        assert len(set(map(tuple, recorded["ids"]))) == len(RECORDED["requests"]), name
        assert recorded["smallest_gap"] > 1e-3, f"{name}: another machine might choose another id"


def test_exports_answer_as_what_they_were_made_of() -> None:
    for exported, source in (("released", "full.ckpt"), ("bins_128_released", "bins_128.ckpt")):
        for what in ("ids", "actions"):
            assert RECORDED["answers"][exported][what] == RECORDED["answers"][source][what]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED["resumed"])
def test_training_goes_on_from_old_checkpoints(name: str, path: Path, tmp_path: Path) -> None:
    """The next two steps have the losses they had then."""
    recorded = RECORDED["resumed"][name]
    places = {"CHECKPOINT": path, "BASE": CHECKPOINTS / "released"}
    overrides = recorded["overrides"]
    for word, place in places.items():
        overrides = [text.replace(word, str(place)) for text in overrides]
    where = [f"paths.log_dir={tmp_path / 'runs'}", f"paths.data_dir={tmp_path / 'data'}"]
    warm_scripts.finish(recorded["script"], tmp_path / "log", *overrides, *where)
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        losses = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}
    assert losses == pytest.approx(dict(enumerate(recorded["losses"], start=2)), rel=1e-4)
