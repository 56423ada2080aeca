"""What cannot be read stops indexing, or is left out and listed: never silently, and never as garbage."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import toy_rlds

from openvla_lightning.data.oxe import describe
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.rlds.records import HEADER, read
from openvla_lightning.data.source.writer import write_rlds

LENGTHS = [5 + number % 5 for number in range(toy_rlds.TRAIN)]


def toy(root: Path, **options) -> RLDS:
    return RLDS(root, "toy", describe("toy", toy_rlds.SPEC), **options)


def plant(root: Path, number: int, step: int, **changes) -> Path:
    """Write the training split with changes to one step of one trajectory."""

    def episode(split: str, index: int) -> dict:
        made = toy_rlds.episode(split, index)
        if index == number:
            changed = made["steps"][step]
            for key, value in changes.items():
                (changed if key in changed else changed["observation"])[key] = value
        return made

    splits = {"train": toy_rlds.TRAIN}
    write_rlds(
        root / "toy" / "1.0.0", toy_rlds.FEATURES, splits, episode, workers=0, episodes_per_shard=5, progress=False
    )
    return next(root.glob("toy/1.0.0/toy-train*00000*"))


def lengths(source: RLDS) -> list[int]:
    return np.diff(source.index.bounds).tolist()


JPEG = b"\xff\xd8\xff\xe0 an image of which the end is missing"
FAULTS = [
    ({"action": np.full(7, np.nan, np.float32)}, r"an action is not a finite vector \(step 2"),
    ({"action": np.full(7, np.inf, np.float32)}, r"an action is not a finite vector \(step 2"),
    ({"image": JPEG}, "observation/image of step 2 is an image cut short"),
    ({"image": b"\x89PNG\r\n\x1a\n and no end"}, "observation/image of step 2 is an image cut short"),
    ({"wrist": b"<html>404"}, "observation/wrist of step 2 is no JPEG, PNG, BMP or GIF"),
]


@pytest.mark.parametrize(("changes", "reason"), FAULTS)
def test_a_bad_trajectory_stops_indexing_or_is_left_out_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict, reason: str
) -> None:
    shard = plant(tmp_path, 3, 2, **changes)
    with pytest.raises(BadShardError, match=rf"{shard.name}, trajectory 3: {reason}.*bad_trajectories=skip"):
        toy(tmp_path).prepare()
    assert not list(tmp_path.glob("toy/1.0.0/.openvla_lightning/*"))
    source = toy(tmp_path, bad_trajectories="skip")
    assert lengths(source) == LENGTHS[:3] + LENGTHS[4:]
    [skipped] = source.index.skipped
    assert (skipped["file"], skipped["trajectory"]) == (shard.name, 3)
    assert f"1 trajectories cannot be read and are left out; all of them are listed in {source._home}" in caplog.text
    for step in range(source.index.num_steps):  # all that is left can be looked at
        assert source.image("wrist", step, 8) is not None
    kept = [meant["action"] for n in range(toy_rlds.TRAIN) if n != 3 for meant in toy_rlds.episode("train", n)["steps"]]
    np.testing.assert_array_equal(source.index.action, kept)


def test_an_image_with_damaged_pixels_is_found_when_every_one_is_decoded(tmp_path: Path) -> None:
    plant(tmp_path, 3, 2, image=b"\xff\xd8 whole at both ends only \xff\xd9")
    assert lengths(toy(tmp_path)) == LENGTHS
    with pytest.raises(BadShardError, match=r"trajectory 3: observation/image of step 2 is damaged: "):
        toy(tmp_path, check_images=True).prepare()
    assert lengths(toy(tmp_path, check_images=True, bad_trajectories="skip")) == LENGTHS[:3] + LENGTHS[4:]


@pytest.mark.parametrize("damage", ["payload", "length", "end"])
def test_damaged_bytes_lose_a_trajectory_or_the_rest_of_the_file(tmp_path: Path, damage: str) -> None:
    shard = plant(tmp_path, -1, 0)
    whole = bytearray(shard.read_bytes())
    starts = [start for start, _ in read(shard)]
    if damage == "end":
        whole = whole[: starts[2] + 100]
    else:
        whole[starts[2] + (100 if damage == "payload" else -HEADER)] ^= 1
    shard.write_bytes(whole)
    source = toy(tmp_path, bad_trajectories="skip")
    lost = [2] if damage == "payload" else [2, 3, 4]
    assert [one["trajectory"] for one in source.index.skipped] == lost
    assert lengths(source) == [length for number, length in enumerate(LENGTHS) if number not in lost]


def test_a_dataset_of_which_nothing_is_left_is_an_error_all_the_same(tmp_path: Path) -> None:
    plant(tmp_path, -1, 0)
    for shard in tmp_path.glob("toy/1.0.0/toy-train*"):
        shard.write_bytes(struct.pack("<Q", 7))
    with pytest.raises(BadShardError, match=r"no trajectory can be read; of toy-train.*, trajectory 0: "):
        toy(tmp_path, bad_trajectories="skip").prepare()


def test_a_file_written_over_while_training_reads_it_is_noticed(tmp_path: Path) -> None:
    shard = plant(tmp_path, -1, 0)
    source = toy(tmp_path)
    assert source.image("primary", 0, 8) is not None
    stamp = shard.stat()
    shard.write_bytes(bytes(stamp.st_size))
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(BadShardError, match=rf"{shard.name} was written to after it was indexed"):
        source.image("primary", 0, 8)


def test_an_unknown_way_with_bad_trajectories_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad_trajectories=ignore: choose error or skip"):
        toy(tmp_path, bad_trajectories="ignore")
