"""LeRobot datasets under stress: a JPEG cache that is killed, files that change, frames that are damaged."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import simplejpeg
import toy_lerobot as toy

from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.lerobot.metadata import Feature
from openvla_lightning.data.source.transcoded import Transcoded


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("lerobot") / "toy").parent


def places() -> list[tuple[int, int]]:
    return [(episode, frame) for episode, length in enumerate(toy.LENGTHS) for frame in range(length)]


def test_a_jpeg_cache_reads_as_records_do(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    source = toy.opened(tmp_path)
    cached = Transcoded(source, ["primary", "wrist"])
    cached.prepare()
    for step, (role, camera) in product(range(source.index.num_steps), (("primary", 0), ("wrist", 1))):
        encoded, pixels, own = cached.encoded(role, step), cached.pixels(role, step), source.pixels(role, step)
        assert encoded is not None
        assert encoded.startswith(b"\xff\xd8")
        assert simplejpeg.decode_jpeg_header(encoded)[3] == ("444" if camera else "420")  # PNG, and a 4:2:0 video
        assert pixels is not None
        assert own is not None
        assert toy.seen(pixels) == (*places()[step], camera)
        assert np.abs(pixels.astype(int) - own).mean() < 3
    records = sorted(cached._home.iterdir())
    stamps = [path.stat().st_mtime_ns for path in records]
    again = Transcoded(toy.opened(tmp_path, mask=[True] * 7), ["primary", "wrist"])
    again.prepare()  # another description of the same files
    assert [path.stat().st_mtime_ns for path in sorted(again._home.iterdir())] == stamps
    assert again._home == cached._home


def test_a_jpeg_cache_goes_on_where_it_was_killed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    code = (
        "import sys, os, toy_lerobot as toy\n"
        "from pathlib import Path\n"
        "from openvla_lightning.data.source import transcoded\n"
        "transcoded.STEPS_PER_FILE = 8\n"
        "cached = transcoded.Transcoded(toy.opened(Path(sys.argv[1])), ['primary'])\n"
        "encoded, left = cached._encoded, [int(sys.argv[2])]\n"
        "def counted(piece):\n"
        "    for one in encoded(piece):\n"
        "        left[0] -= 1\n"
        "        if left[0] == 0: os.kill(os.getpid(), 9)\n"
        "        yield one\n"
        "cached._encoded = counted\n"
        "cached.prepare()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path), "25"], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpegs") if not path.name.startswith(".")}
    assert 0 < len(made) < 6
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), "-1"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    code = (
        "import sys, time, toy_lerobot as toy\n"
        "from pathlib import Path\n"
        "folder, recording = Path(sys.argv[1]), toy.recording\n"
        "def counted(number):\n"
        "    with (folder / 'calls').open('a') as file: file.write(f'{number}\\n')\n"
        "    time.sleep(0.2)\n"
        "    return recording(number)\n"
        "toy.recording = counted\n"
        "toy.write(folder / 'toy')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment) for _ in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert sorted(map(int, (tmp_path / "calls").read_text().split())) == list(range(7))
    assert not list((tmp_path / "toy").glob(".*"))


def test_each_choice_of_cameras_has_copies_of_its_own(tmp_path: Path) -> None:
    """Pictures in parquet files are copied once; copies for one camera have other offsets than those for two."""
    both = {toy.FRONT: Feature("image", (toy.HEIGHT, toy.WIDTH, 3)), toy.WRIST: toy.FEATURES[toy.WRIST]}
    toy.write(tmp_path / "toy", features=toy.FEATURES | both, episodes_per_file=7)
    code = (
        "import sys, time, json, toy_lerobot as toy\n"
        "from pathlib import Path\n"
        "from openvla_lightning.data.source.lerobot import rows\n"
        "root, own, other, copied = Path(sys.argv[1]), *sys.argv[2:4], rows._pictures\n"
        "def together(file, names):\n"
        "    (root / own).touch()\n"
        "    while not (root / other).exists(): time.sleep(0.01)\n"
        "    return copied(file, names)\n"
        "rows._pictures = together\n"
        "toy.opened(root, cameras=json.loads(sys.argv[4])).prepare()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    chosen = {"one": {"primary": toy.WRIST}, "two": {"primary": toy.FRONT, "wrist": toy.WRIST}}
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [
        subprocess.Popen([*command, *names, json.dumps(chosen[names[0]])], env=environment)
        for names in (("one", "two"), ("two", "one"))
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    third = {"primary": toy.FRONT}
    for cameras in (*chosen.values(), third):
        source = toy.opened(tmp_path, cameras=cameras)
        for role, (step, place) in product(cameras, enumerate(places())):
            pixels = source.pixels(role, step)
            assert pixels is not None
            assert toy.seen(pixels) == (*place, int(cameras[role] == toy.WRIST))


def test_a_file_that_changes_or_goes_ends_reading(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    source = toy.opened(tmp_path)
    video = tmp_path / "toy" / source.index.files[0]
    assert source.pixels("primary", 0) is not None
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(BadShardError, match="was written to after it was indexed"):
        source.pixels("primary", 1)
    with pytest.raises(BadShardError, match=r"toy: .*file-000.mp4, episode"):
        toy.opened(tmp_path).prepare()


@pytest.mark.parametrize("every", [False, True])
def test_damage_inside_a_video_is_found_where_every_frame_is_looked_at(root: Path, tmp_path: Path, every: bool) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    source = toy.opened(root)
    file, offset, size = source.index.images["primary"][8].tolist()
    video = tmp_path / "toy" / source.index.files[file]
    content = bytearray(video.read_bytes())
    content[offset : offset + size] = bytes(size)
    video.write_bytes(content)
    if every:
        with pytest.raises(BadShardError, match=r"file-000.mp4, episode 1: .*cannot be decoded"):
            toy.opened(tmp_path, check_images=True).prepare()
        left = toy.opened(tmp_path, check_images=True, bad_trajectories="skip")
        assert {one["trajectory"] for one in left.index.skipped} == {1, 2}
        assert all(left.pixels("primary", step) is not None for step in range(left.index.num_steps))
    else:
        damaged = toy.opened(tmp_path)
        with pytest.raises(BadShardError, match=r"file-000.mp4: "):
            damaged.pixels("primary", 8)
        assert toy.seen(damaged.pixels("primary", 30))[:2] == places()[30]


def replaced(folder: Path, row: int, picture: Callable[[bytes], bytes | None]) -> None:
    """Change the picture of the wrist in one row of the first parquet file."""
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pyarrow.parquet.read_table(path)
    pictures = table.column(toy.WRIST).to_pylist()
    pictures[row] = {"bytes": picture(pictures[row]["bytes"]), "path": "/home/bob/frame.png"}
    place = table.schema.get_field_index(toy.WRIST)
    pyarrow.parquet.write_table(table.set_column(place, toy.WRIST, [pictures]), path)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (lambda whole: whole[: len(whole) // 2], "is an image cut short"),
        (lambda whole: b"version https://git-lfs", "is no JPEG, PNG, BMP or GIF"),
        (lambda whole: None, "holds no picture, at most a path to one"),
    ],
)
def test_a_picture_in_parquet_that_is_none_is_found_while_indexing(
    root: Path, tmp_path: Path, picture: Callable[[bytes], bytes | None], reason: str
) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    replaced(tmp_path / "toy", toy.LENGTHS[0] + 2, picture)
    with pytest.raises(BadShardError, match=rf"toy: .*file-000.parquet, episode 1: {toy.WRIST} of frame 2 {reason}"):
        toy.opened(tmp_path).prepare()
    left = toy.opened(tmp_path, bad_trajectories="skip")
    assert [one["trajectory"] for one in left.index.skipped] == [1]
    assert all(left.pixels("wrist", step) is not None for step in range(left.index.num_steps))


def test_a_picture_in_parquet_with_damaged_pixels_is_found_where_every_one_is_decoded(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    replaced(tmp_path / "toy", 1, lambda whole: whole[:40] + bytes(30) + whole[70:])
    toy.opened(tmp_path).prepare()  # the ends are whole; the pictures that this copies are looked at again
    with pytest.raises(BadShardError, match=rf"episode 0: {toy.WRIST} of frame 1 is damaged: "):
        toy.opened(tmp_path, check_images=True).prepare()


def wider(trajectory: dict[str, Any]) -> dict[str, Any]:
    """The episode of nine steps gets an action of eight numbers."""
    steps = len(trajectory["action"])
    return trajectory | {"action": np.zeros((steps, 8 if steps == 9 else 7), np.float32)}


def test_an_episode_of_another_width_is_named_or_left_out(root: Path) -> None:
    options = {"transform": f"{__name__}.wider"}
    with pytest.raises(BadShardError, match=r"episode 1: its action has 8 numbers, that of episode 0 7"):
        toy.opened(root, **options).prepare()
    left = toy.opened(root, bad_trajectories="skip", **options)
    assert [one["trajectory"] for one in left.index.skipped] == [1]
