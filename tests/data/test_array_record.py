"""array_record datasets serve what their TFRecord versions serve."""

import json
import multiprocessing
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_rlds
from array_record.python.array_record_module import ArrayRecordWriter

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.oxe import describe
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds import RLDS, array_records
from openvla_lightning.data.source.rlds.records import read

SPEC = describe("toy", toy_rlds.SPEC)


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Otherwise the loaders of all later tests would spawn their workers, which takes seconds each time."""
    yield
    array_records._reading_process = None


def convert(source: Path, target: Path, options: str) -> Path:
    """The same records in the other format."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if ".tfrecord" in path.name:
            writer = ArrayRecordWriter(str(target / path.name.replace(".tfrecord", ".array_record")), options)
            for _, record in read(path):
                writer.write(record)
            writer.close()
        elif path.suffix == ".json":
            (target / path.name).write_text(path.read_text().replace("tfrecord", "array_record"))
    assert json.loads((target / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    return target


@pytest.mark.parametrize("options", ["", "group_size:1,uncompressed", "group_size:4"])
def test_serves_what_tfrecord_serves(tmp_path: Path, options: str) -> None:
    written = toy_rlds.write(tmp_path / "a/toy/1.0.0")
    convert(written, tmp_path / "b/toy/1.0.0", options)
    expected, found = RLDS(tmp_path / "a", "toy", SPEC), RLDS(tmp_path / "b", "toy", SPEC)
    for name in ("action", "proprio", "bounds", "split", "instruction"):
        np.testing.assert_array_equal(getattr(found.index, name), getattr(expected.index, name))
    assert found.index.instructions == expected.index.instructions
    for step in np.random.default_rng(0).permutation(expected.index.num_steps).tolist():
        for role in SPEC.cameras:
            assert found.encoded(role, step) == expected.encoded(role, step)
    sent = pickle.loads(pickle.dumps(found))
    _same(sent, expected)
    through_a_cache = RLDS(f"file://{tmp_path}/b", "toy", SPEC, cache_dir=tmp_path / "cache")
    _same(through_a_cache, expected)


def test_workers_start_in_a_way_that_survives_what_was_read_before(tmp_path: Path) -> None:
    convert(toy_rlds.write(tmp_path / "a/toy/1.0.0"), tmp_path / "b/toy/1.0.0", "")
    datamodule = VLADataModule(partial(RLDS, tmp_path / "b"), {"toy": 1.0}, list, 8, 2, datasets={"toy": toy_rlds.SPEC})
    datamodule.setup()
    loader = datamodule.train_dataloader()
    here = loader.dataset[next(iter(loader.batch_sampler or loader.sampler))]
    served = next(iter(loader))
    for one, other in zip(served, here, strict=True):
        assert one.observation.instruction == other.observation.instruction
        np.testing.assert_array_equal(one.observation.images["primary"], other.observation.images["primary"])


def test_a_forked_process_is_told_why_it_cannot_read(tmp_path: Path) -> None:
    """Reading there crashed: the library's thread of the parent is missing, not its locks."""
    convert(toy_rlds.write(tmp_path / "a/toy/1.0.0"), tmp_path / "b/toy/1.0.0", "")
    dataset = RLDS(tmp_path / "b", "toy", SPEC)
    dataset.encoded("primary", 0)
    context = multiprocessing.get_context("fork")
    said: Any = context.SimpleQueue()
    child = context.Process(target=_what_is_said, args=(dataset, said))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert "spawn" in said.get()


def _what_is_said(dataset: RLDS, said: Any) -> None:
    try:
        dataset.encoded("primary", 7)
    except RuntimeError as error:
        said.put(str(error))


def _same(one: RLDS, other: RLDS) -> None:
    for step in range(0, other.index.num_steps, 7):
        assert one.encoded("primary", step) == other.encoded("primary", step)


def test_damage_names_the_file_and_can_be_left_out(tmp_path: Path) -> None:
    written = toy_rlds.write(tmp_path / "a/toy/1.0.0")
    folder = convert(written, tmp_path / "b/toy/1.0.0", "group_size:1,uncompressed")
    path = sorted(folder.glob("*train*.array_record*"))[0]
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xd8")] ^= 255
    path.write_bytes(data)
    with pytest.raises(BadShardError, match=path.name):
        RLDS(tmp_path / "b", "toy", SPEC).prepare()
    index = RLDS(tmp_path / "b", "toy", SPEC, bad_trajectories="skip").index
    assert [one["file"] for one in index.skipped] == [path.name]
    assert index.num_trajectories == toy_rlds.TRAIN + toy_rlds.VAL - 1
