"""From HDF5 in the layouts of robomimic, LIBERO and ALOHA to RLDS: nothing is lost without a word, nor guessed."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from openvla_lightning.data.convert import hdf5
from openvla_lightning.data.convert.__main__ import main
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.rlds.episodes import Episodes

STEPS = 5


def shade(demo: int, step: int) -> np.ndarray:
    image = np.zeros((16, 24, 3), np.uint8)
    image[:8] = 20 * demo + 10 * step  # the upper half
    return image


def robomimic(path: Path, problem: dict | None = None) -> None:
    h5py = pytest.importorskip("h5py", reason="the extra `hdf5` is not installed")
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if problem is not None:
            data.attrs["problem_info"] = json.dumps(problem)
        for demo in (0, 1, 10, 2):
            group = data.create_group(f"demo_{demo}")
            group["actions"] = np.full((STEPS, 7), demo, np.float64)
            group["rewards"] = np.arange(STEPS, dtype=np.float32)
            group["obs/agentview_rgb"] = np.stack([shade(demo, step) for step in range(STEPS)])
            group["obs/ee_pos"] = np.random.default_rng(demo).normal(size=(STEPS, 3))
            group["next_obs/ee_pos"] = np.zeros((STEPS, 3))


def test_robomimic_and_libero_files_become_rlds(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    robomimic(tmp_path / "a" / "x_demo.hdf5")
    robomimic(tmp_path / "a" / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", {"language_instruction": "turn it on"})
    main(["hdf5-to-rlds", str(tmp_path / "a"), str(tmp_path / "b" / "1.0.0"), "--workers", "0", "--turned"])
    source = RLDS(tmp_path, "b", describe("b", {"cameras": {"primary": "agentview_rgb"}, "state": ["ee_pos"]}))
    index = source.index
    assert index.action[::STEPS, 0].tolist() == [0, 1, 2, 10] * 2
    assert {index.instructions[i] for i in index.instruction} == {"turn it on", "x"}
    for trajectory, demo in enumerate([0, 1, 2, 10] * 2):
        pixels = source.pixels("primary", trajectory * STEPS + 3)
        assert pixels is not None
        assert abs(pixels[12].mean() - (20 * demo + 30)) < 1.5  # what was above is below
        assert pixels[2].mean() < 2
    np.testing.assert_array_equal(
        index.proprio[:STEPS], np.random.default_rng(0).normal(size=(STEPS, 3)).astype(np.float32)
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole, target = tmp_path / "a" / "x_demo.hdf5", str(tmp_path / "b" / "1.0.0")
    whole.parent.mkdir()
    robomimic(whole)
    content = whole.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7121920\n"
    for bad, said in ((content[:-900], "truncated"), (b"", "truncated|signature"), (pointer, "`git lfs pull`")):
        whole.write_bytes(bad)
        with pytest.raises(SystemExit, match=rf"x_demo\.hdf5 cannot be read: .*({said})"):
            main(["hdf5-to-rlds", str(tmp_path / "a"), target, "--workers", "0"])
    assert not Path(target).exists()


def demonstrations(folder: Path, *demos: dict, attributes: Mapping[str, object] | None = None) -> list[str]:
    """A file of robomimic's layout, whose demonstrations hold this beside their actions; the command that converts."""
    h5py = pytest.importorskip("h5py", reason="the extra `hdf5` is not installed")
    folder.mkdir()
    with h5py.File(folder / "x_demo.hdf5", "w") as file:
        for number, demo in enumerate(demos):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = np.zeros((demo.pop("steps", STEPS), 7), np.float32)
            group.attrs.update(demo.pop("attrs", {}))
            for path, values in demo.items():
                group[path] = values
        file["data"].attrs.update(attributes or {})
    return ["hdf5-to-rlds", str(folder), str(folder / "new" / "1.0.0"), "--workers", "0"]


@pytest.mark.parametrize(
    ("own", "attributes", "heard"),
    [
        (
            [{"ep_meta": json.dumps({"lang": f"open drawer {i}"})} for i in range(2)],
            {},
            ["open drawer 0", "open drawer 1"],
        ),
        ([{"language": "pull"}, {}], {"language_instruction": "push"}, ["pull", "push"]),
        ([{}, {}], {"language": ["pick it up"]}, ["pick it up"]),
        ([{}, {}], {"language": np.array([b"pick it up"])}, ["pick it up"]),
        ([{}, {}], {"problem_info": json.dumps({"language_instruction": [*'"put it down"']})}, ["put it down"]),
        ([{}, {}], {"problem_info": "{damaged"}, ["x"]),
    ],
)
def test_what_each_demonstration_says_is_its_instruction(
    tmp_path: Path, own: list[dict], attributes: dict, heard: list[str]
) -> None:
    main(demonstrations(tmp_path / "a", *({"attrs": one} for one in own), attributes=attributes))
    assert Episodes(tmp_path / "a" / "new" / "1.0.0", "language_instruction").words == heard


def test_what_is_left_out_of_hdf5_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = {"obs/after": np.zeros((STEPS + 1, 2)), "said": np.array([b"hm"] * STEPS), "is_last": np.zeros(STEPS)}
    main(demonstrations(tmp_path / "a", {"steps": 0}, demo | {"next_obs/pose": np.zeros((STEPS, 2))}))
    out = capsys.readouterr().out
    assert "left out, as they have no step: 1 demonstrations" in out
    for said in ("obs/after ([6, 2] for 5 actions)", "said (no numbers)", "is_last (a step has", "next_obs (a copy"):
        assert said in out
    with pytest.raises(SystemExit, match=r"x_demo.hdf5: none of the 1 demonstrations has a step"):
        main(demonstrations(tmp_path / "b", {"steps": 0}))


@pytest.mark.parametrize(
    "other", [{}, {"obs/pose": np.zeros((STEPS, 3))}, {"obs/pose": np.zeros((STEPS, 2), np.int32)}]
)
def test_demonstrations_that_hold_other_data_are_named_before_anything_is_written(tmp_path: Path, other: dict) -> None:
    command = demonstrations(tmp_path / "a", {"obs/pose": np.zeros((STEPS, 2))}, other)
    with pytest.raises(
        SystemExit, match=r"x_demo.hdf5 data/demo_1: observation/pose is .*, and float32 \[2\] in the first"
    ):
        main(command)
    assert not (tmp_path / "a" / "new").exists()


def test_demonstrations_come_in_the_order_of_their_numbers() -> None:
    names = ["demo_10", "demo_2_again", "demo_2", "demo_0", "demo"]
    assert sorted(names, key=hdf5._by_number) == ["demo", "demo_0", "demo_2", "demo_2_again", "demo_10"]


def test_aloha_files_become_rlds(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="the extra `hdf5` is not installed")
    for number in range(2):
        with h5py.File(tmp_path / f"episode_{number}.hdf5", "w") as file:
            file.attrs["compress"] = True
            file["action"] = np.full((STEPS, 14), number, np.float32)
            file["observations/qpos"] = np.ones((STEPS, 14), np.float64)
            encoded = [simplejpeg.encode_jpeg(shade(number, step), 95) for step in range(STEPS)]
            padded = np.zeros((STEPS, max(map(len, encoded)) + 50), np.uint8)
            for row, one in zip(padded, encoded, strict=True):
                row[: len(one)] = np.frombuffer(one, np.uint8)
            file["observations/images/cam_high"] = padded
    target = str(tmp_path / "aloha" / "1.0.0")
    with pytest.raises(SystemExit, match="give it with --language"):
        main(["hdf5-to-rlds", str(tmp_path), target, "--workers", "0"])
    main(["hdf5-to-rlds", str(tmp_path), target, "--workers", "0", "--language", "fold the shirt"])
    spec = {"cameras": {"primary": "cam_high"}, "state": ["qpos"], "encoding": "joint_pos_bimanual"}
    source = RLDS(tmp_path, "aloha", describe("aloha", spec))
    assert source.index.action.shape == (2 * STEPS, 14)
    pixels = source.pixels("primary", STEPS + 2)
    assert pixels is not None
    assert abs(pixels[2].mean() - 40) < 3
