"""LeRobot datasets that were written here: read, mixed with RLDS, cached, served by many processes, damaged."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import toy_lerobot as toy
import toy_rlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from openvla_lightning.data import VLADataModule
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.oxe.spec import DescriptionError
from openvla_lightning.data.preflight import MissingDataError
from openvla_lightning.data.source.formats import stored
from openvla_lightning.data.source.lerobot import LeRobot
from openvla_lightning.data.source.lerobot.encoding import Encoding
from openvla_lightning.data.source.lerobot.film import FRAMES
from openvla_lightning.data.source.lerobot.packets import Video, match, segments
from openvla_lightning.data.source.lerobot.remote import RemoteFiles


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lerobot")
    toy.write(folder / "toy")
    toy.write(folder / "long", encoding=Encoding(key_every=250), splits={"train": (0, 5), "val": (5, 7)})
    return folder


def places() -> list[tuple[int, int]]:
    return [(episode, frame) for episode, length in enumerate(toy.LENGTHS) for frame in range(length)]


@pytest.mark.parametrize("name", ["toy", "long"])
def test_every_step_is_what_was_written(root: Path, name: str) -> None:
    source = toy.opened(root, name)
    index = source.index
    recordings = [toy.recording(number) for number in range(len(toy.LENGTHS))]
    np.testing.assert_array_equal(index.action, np.concatenate([one.columns["action"] for one in recordings]))
    np.testing.assert_array_equal(
        index.proprio, np.concatenate([one.columns["observation.state"] for one in recordings])
    )
    assert [index.instructions[i] for i in index.instruction] == [task for one in recordings for task in one.tasks]
    assert np.diff(index.bounds).tolist() == list(toy.LENGTHS)
    assert source.spec.control_hz == 10
    assert source.remarks == ()  # our own writer's statistics are exact
    order = np.random.default_rng(1).permutation(index.num_steps)
    for step, (episode, frame) in ((int(i), places()[i]) for i in order):
        for camera, role in enumerate(toy.CAMERAS):
            pixels = source.pixels(role, step)
            assert pixels is not None
            assert toy.seen(pixels) == (episode, frame, camera)
        assert source.where(step).startswith(f"episode {episode}, frame {frame} of videos/")
        np.testing.assert_array_equal(source.pixels("wrist", step), recordings[episode].pictures[toy.WRIST][frame])


@given(st.data())
@settings(max_examples=30)
def test_runs_are_the_frames_that_are_read_one_by_one(root: Path, data: st.DataObject) -> None:
    source = toy.opened(root, data.draw(st.sampled_from(["toy", "long"])))
    steps = data.draw(st.lists(st.integers(0, sum(toy.LENGTHS) - 1), unique=True, max_size=20))
    role = data.draw(st.sampled_from([*toy.CAMERAS]))
    found = dict(source.run(role, steps))
    assert sorted(found) == sorted(steps)
    for step, pixels in found.items():
        np.testing.assert_array_equal(pixels, source.pixels(role, step))


@given(st.integers(1, 40), st.integers(1, 9), st.randoms(use_true_random=False), st.data())
@settings(max_examples=100)
def test_segments_hold_what_is_wanted_from_a_key_frame_on(frames: int, gap: int, random, data: st.DataObject) -> None:
    shown = [*range(frames)]
    for start in range(1, frames - 1, 3):  # frames decoded in another order than they are shown
        part = shown[start : start + 3]
        random.shuffle(part)
        shown[start : start + 3] = part
    keys = np.array([i for i in range(frames) if i % gap == 0])
    packets = np.array([[pts, 0, 1, i in keys] for i, pts in enumerate(shown)], np.int64)
    wanted = data.draw(st.lists(st.integers(0, frames - 1), min_size=1))
    runs = segments(packets, keys, wanted)
    for packet in wanted:
        (run,) = [(first, last) for first, last in runs if first <= packet <= last]
        assert packets[run[0], 3] or run[0] == 0
    assert all(one[1] + 1 < other[0] for one, other in pairwise(runs))


@given(st.sampled_from([5, 10, 24, 29.97, 30, 50, 120]), st.integers(1, 3000), st.integers(0, 100_000))
def test_the_frame_at_a_time_is_never_the_next_one(fps: float, frames: int, start: int) -> None:
    base = 15360
    pts = np.round(np.arange(frames) * base / fps).astype(np.int64)
    packets = np.stack([pts, pts, pts, np.ones_like(pts)], axis=1)
    first = start % frames
    times = first / fps + (np.arange(frames - first) / fps).astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(match(Video("", time_base=(1, base)), packets, times, fps), np.arange(first, frames))
    beyond = np.array([frames / fps, -1 / fps, (frames - 0.5) / fps])
    assert match(Video("", time_base=(1, base)), packets, beyond, fps).tolist() == [-1, -1, -1]


def module(root: Path, **options) -> VLADataModule:
    told = {"mix": {"toy": 1.0, "rlds": 2.0}, "num_workers": 0, "cameras": ("primary", "wrist")} | options
    datasets = {"toy": toy.described("toy", gripper={"open": -1, "closed": 1}), "rlds": toy_rlds.SPEC}
    found = VLADataModule(
        partial(stored, root), told.pop("mix"), list, 32, 8, datasets=datasets, noop_filter="none", **told
    )
    found.prepare_data()
    found.setup()
    return found


@pytest.fixture(scope="module")
def mixed(root: Path) -> Path:
    toy_rlds.write(root / "rlds" / "1.0.0")
    return root


def test_a_mixture_with_rlds_has_one_order_that_goes_on_where_it_was(mixed: Path) -> None:
    data = module(mixed)
    whole = [step for batch in data.train_dataloader() for step in batch]
    names = [step.dataset_name for step in whole]
    assert {*names} == {"toy", "rlds"}
    assert set(np.concatenate([step.action[:, 6] for step in whole if step.dataset_name == "toy"])) == {0.0, 1.0}
    resumed = module(mixed)
    resumed.load_state_dict(data.state_dict() | {"samples_served": 16})
    rest = [step for batch in resumed.train_dataloader() for step in batch]
    for one, other in zip(whole[16:], rest, strict=False):
        assert (one.number, one.dataset_name) == (other.number, other.dataset_name)
        assert one.observation.instruction == other.observation.instruction
        np.testing.assert_array_equal(one.action, other.action)
        np.testing.assert_array_equal(one.observation.images["primary"], other.observation.images["primary"])
    number = next(step.number for step in whole if step.dataset_name == "toy")
    assert "episode" in data.where(number)
    assert ".mp4" in data.where(number)


def test_workers_forked_after_decoding_here_read_the_same(mixed: Path) -> None:
    data = module(mixed)
    here = [step for batch in data.train_dataloader() for step in batch]  # decoders with threads are in this process
    assert FRAMES.decoders
    there = [step for batch in module(mixed, num_workers=2).train_dataloader() for step in batch]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.observation.images["primary"], other.observation.images["primary"])


def test_a_source_goes_to_spawned_workers(root: Path) -> None:
    source = toy.opened(root)
    loader = DataLoader(_Steps(source), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for step, image in enumerate(loader):
        np.testing.assert_array_equal(image, source.image("primary", step, 32))


class _Steps:
    def __init__(self, source: LeRobot) -> None:
        self.source = source

    def __len__(self) -> int:
        return 6

    def __getitem__(self, step: int) -> np.ndarray:
        if step >= len(self):
            raise IndexError(step)
        image = self.source.image("primary", step, 32)
        assert image is not None
        return image


def test_windows_shuffle_within_files(mixed: Path) -> None:
    data = module(mixed, mix={"toy": 1.0}, window_gb=1e-9)
    steps = [step for batch in data.train_dataloader() for step in batch]
    files = [data.where(step.number).split(" of ")[1].split(",")[0] for step in steps]
    assert len(dict.fromkeys(files)) == len(
        [1 for one, other in zip([None, *files], files, strict=False) if one != other]
    )


def test_modality_names_slices_and_cameras(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(".openvla_lightning"))
    said = {
        "state": {"pose": {"start": 0, "end": 6}, "gripper": {"start": 6, "end": 7}},
        "action": {"turn": {"start": 3, "end": 6}, "gripper": {"start": 6, "end": 7}},
        "video": {"ego": {"original_key": toy.FRONT}},
        "annotation": {"human.task": {"original_key": "task_index"}},
    }
    (tmp_path / "toy" / "meta" / "modality.json").write_text(json.dumps(said))
    options = {"cameras": {"primary": "video.ego"}, "state": ["state.pose"], "language": "annotation.human.task"}
    source = toy.opened(tmp_path, action=["action.turn", "action.gripper"], **options)
    whole = toy.opened(root)
    source.check()
    np.testing.assert_array_equal(source.index.action, whole.index.action[:, 3:])
    np.testing.assert_array_equal(source.index.proprio, whole.index.proprio[:, :6])
    assert source.index.instructions == whole.index.instructions
    np.testing.assert_array_equal(source.pixels("primary", 7), whole.pixels("primary", 7))


def test_what_is_wrong_is_said_before_anything_is_read(root: Path) -> None:
    with pytest.raises(DescriptionError, match=r"did you mean 'observation.images.front'"):
        toy.opened(root, cameras={"primary": "observation.image.front"}).check()
    with pytest.raises(DescriptionError, match=r"did you mean 'observation.state'"):
        toy.opened(root, state=["observation.stat"]).check()
    with pytest.raises(DescriptionError, match=r"language: 'task_index' is int64, not text \(without this option, "):
        toy.opened(root, language="task_index").check()
    with pytest.raises(ValueError, match=r"unknown format 'lerobots'; known: rlds, lerobot"):
        describe("x", {"format": "lerobots", "cameras": {"primary": "image"}})
    with pytest.raises(ValueError, match="goes with `format: lerobot`"):
        describe("x", {"hub": "a/b", "cameras": {"primary": "image"}})
    for gripper in ({"open": 1}, {"open": 1, "closed": 1}, 3):
        with pytest.raises(ValueError, match=r"data.datasets.x.gripper"):
            describe("x", {"gripper": gripper, "cameras": {"primary": "image"}})
    absent = VLADataModule(partial(stored, root), {"x": 1.0}, list, 32, 8, datasets={"x": toy.described("x")})
    with pytest.raises(MissingDataError, match=r"no .*/x/meta/info.json.*data.datasets.x.path"):
        absent.prepare_data()


def test_a_dataset_lies_where_its_description_says(root: Path, tmp_path: Path) -> None:
    source = LeRobot(tmp_path, "mine", describe("mine", toy.described(path=str(root / "toy"))))
    assert source.missing() is None
    assert source.index.num_steps == sum(toy.LENGTHS)


def test_a_url_is_read_through_the_cache(root: Path, tmp_path: Path) -> None:
    url = f"file://{root}/toy"
    source = LeRobot(tmp_path, "mine", describe("mine", toy.described(path=url)), cache_dir=tmp_path / "cache")
    here = toy.opened(root)
    np.testing.assert_array_equal(source.index.action, here.index.action)
    for step in (0, 20, 44):
        np.testing.assert_array_equal(source.pixels("primary", step), here.pixels("primary", step))
        np.testing.assert_array_equal(source.pixels("wrist", step), here.pixels("wrist", step))
    by_root = LeRobot(f"file://{root}", "toy", describe("toy", toy.described()), cache_dir=tmp_path / "cache")
    assert by_root.index.num_steps == here.index.num_steps
    lost = LeRobot(tmp_path, "mine", describe("mine", toy.described(path=f"{url}_not")), cache_dir=tmp_path / "cache")
    assert "meta/info.json" in (lost.missing() or "")


def test_datasets_whose_urls_end_alike_are_kept_apart(tmp_path: Path) -> None:
    folders = []
    for lab in ("ours", "theirs"):
        folder = tmp_path / lab / "a_long_name_that_both_of_the_labs_use" / "pick_and_place_of_everything_2026"
        (folder / "meta").mkdir(parents=True)
        (folder / "meta" / "info.json").write_text(lab)
        files = RemoteFiles(f"file://{folder}", tmp_path / "cache", 1.0)
        folders.append(files.folder)
        assert (files.folder / "meta" / "info.json").read_text() == lab
    assert (folders[0] / "meta" / "info.json").read_text() == "ours"


def test_a_description_is_the_same_one_in_every_process(root: Path) -> None:
    code = (
        "import toy_lerobot as toy, sys; from pathlib import Path\n"
        "options = {'gripper': {'open': -1, 'closed': 1}, 'transform': 'toy_lerobot.seen'}\n"
        "print(toy.opened(Path(sys.argv[1]), **options).spec.fingerprint)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    told = {
        subprocess.run([sys.executable, "-c", code, str(root)], env=environment, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(told) == 1
    assert len(told.pop().strip()) == 64
