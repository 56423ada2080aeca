"""The package as users install it: a wheel, in an environment without this checkout, used from an empty folder.

A lab's own package (`tests/my_lab`) is installed beside it, and brings a head, a dataset with code, a world, a
strategy, a logger and configs; nothing of this repository is edited.
"""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from setuptools import find_packages
from toy_rlds_lab import write_lab_arm

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def nothing_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests' own shell says about this checkout, or about a run, does not reach the environment under test."""
    for name in ("PYTHONPATH", "RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = [*find_packages(str(ROOT), include=["openvla_lightning*"]), "openvla_lightning.conf"]
    assert sorted(listed) == sorted(there)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from what the sdist holds."""
    root = tmp_path_factory.mktemp("built")
    source = root / "source"
    for name in ("conf", "openvla_lightning"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "local"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source / name)
    (source / "tests").mkdir()
    (source / "tests" / "test_of_a_checkout.py").touch()
    build = [sys.executable, "-m", "uv", "build", "--no-build-isolation", "--quiet", "--out-dir", str(root / "dist")]
    subprocess.run([*build, "--python", sys.executable, str(source)], check=True)
    return root / "dist"


@pytest.fixture(scope="module")
def bare(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and our dependencies, but not this checkout."""
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "env", with_pip=False)
    python = root / "env/bin/python"
    packages = Path(subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"],
                                   capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
    # Dependencies come from here; a plain path, so that the link to this checkout is not followed.
    (packages / "dependencies.pth").write_text(f"{site.getsitepackages()[0]}\n")
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", str(python)]
    subprocess.run([*install, str(next(built.glob("*.whl")))], check=True)
    subprocess.run([*install, "--no-build-isolation", str(shutil.copytree(ROOT / "tests/my_lab", root / "my_lab"))],
                   check=True)  # fmt: skip
    return root / "env/bin"


def test_the_sdist_and_the_wheel_are_complete_and_valid(built: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2]: name for name in archive.getnames()}
        said = archive.extractfile(sources["PKG-INFO"])
        assert said is not None
        about = [said.read()]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about += [archive.read(name) for name in names if name.endswith(".dist-info/METADATA")]
    for text in about:
        metadata = Metadata.from_email(text, validate=True)  # raises with every field that the index would refuse
        assert metadata.name == "openvla-lightning"
        assert metadata.description_content_type == "text/markdown"
        assert metadata.description == (ROOT / "README.md").read_text()
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"} <= set(sources)
    assert not [name for name in sources if name.startswith("tests")], "without their fixtures they cannot run"
    files = {path.relative_to(ROOT) for top in ("openvla_lightning", "conf") for path in (ROOT / top).rglob("*.*")}
    shipped = {f for f in files if f.suffix in (".py", ".yaml", ".json") and "local" not in f.parts}
    inside = {str(Path("openvla_lightning") / f) if f.parts[0] == "conf" else str(f) for f in shipped}
    assert inside <= set(names), sorted(inside - set(names))


def openvla(bare: Path, folder: Path, *words: str, fails: bool = False) -> str:
    """Run `openvla ...` in `folder`; return what it printed."""
    done = subprocess.run([bare / "openvla", *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_installed_command_trains_finetunes_and_evaluates_in_an_empty_folder(bare: Path, tmp_path: Path) -> None:
    code = "import openvla_lightning, sys; print(openvla_lightning.__file__)"
    where = subprocess.run([bare / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(bare.parent) in where.stdout, "the checkout must not be what is tested"
    said = openvla(bare, tmp_path, "train", "+debug=tiny", "trainer.max_steps=2", "save_every=2")
    assert "leaked" not in said, "native modules look at what is left when the process ends"
    tuned = ("strategy=lora", "rank=32", "+debug=tiny", "trainer.max_steps=2", "save_every=2")
    openvla(bare, tmp_path, "finetune", *tuned)
    said = openvla(bare, tmp_path, "evaluate", "episodes_per_task=1", "tasks=[lift]", "env.max_episode_steps=3",
                   "num_envs=2", "num_workers=1", "label=installed")  # fmt: skip
    assert "installed" in said
    assert list((tmp_path / "runs/evaluate").rglob("results.json"))
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "data"}, "nothing else is left behind"
    exported = openvla(bare, tmp_path, "export", "runs/finetune", "released")
    assert "written to" in exported
    assert (tmp_path / "released/config.json").is_file()


def test_help_and_composition_need_no_checkout(bare: Path, tmp_path: Path) -> None:
    assert "openvla train" in openvla(bare, tmp_path, "train", "--help")
    assert "ckpt_path" in openvla(bare, tmp_path, "serve", "--help")
    assert "openvla data-report" in openvla(bare, tmp_path)
    assert "has no command 'trian'" in openvla(bare, tmp_path, "trian", fails=True)
    assert "complete -F _openvla openvla" in openvla(bare, tmp_path, "completion", "bash")
    code = (
        "from hydra import compose, initialize_config_module\n"
        "import openvla_lightning.config\n"
        "with initialize_config_module('openvla_lightning.conf', version_base='1.3'):\n"
        "    compose('train', ['action_head=smooth'])\n"
    )
    subprocess.run([bare / "python", "-c", code], cwd=tmp_path, check=True)


def test_a_shell_completes_commands_and_options(bare: Path, tmp_path: Path) -> None:
    script = f"""
    export PATH={bare}:$PATH
    eval "$(openvla completion bash)"
    COMP_WORDS=(openvla tr); COMP_CWORD=1; COMP_LINE="openvla tr"; COMP_POINT=10; _openvla; echo "${{COMPREPLY[@]}}"
    COMP_WORDS=(openvla train trainer=); COMP_CWORD=2; COMP_LINE="openvla train trainer="; COMP_POINT=22
    _openvla; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.split() == ["train"]
    assert {"trainer=cpu", "trainer=fsdp"} <= set(second.split())


def test_a_lab_s_package_adds_every_kind_of_part(bare: Path, tmp_path: Path) -> None:
    write_lab_arm(tmp_path / "data/lab_arm/1.0.0")
    openvla(bare, tmp_path, "train", "+experiment=lab")
    (run,) = (tmp_path / "runs/train").iterdir()
    assert (run / "lines.txt").read_text().startswith(("0 ", "1 "))
    said = openvla(bare, tmp_path, "evaluate", "env=dot", "episodes_per_task=1", "num_workers=1", "num_envs=2")
    assert "go" in said
    code = (
        "import numpy as np, openvla_lightning as o\n"
        "policy = o.Policy.from_pretrained('runs/train', device='cpu')\n"
        "print(type(policy.processor.action_head).__name__, policy.processor.action_head.smoothing)\n"
        "print(policy.act(np.zeros((48, 48, 3), np.uint8), 'go left').shape, policy.unnorm_key)\n"
        "print(policy.statistics.action['q99'][0] < 1)\n"
    )
    acted = subprocess.run([bare / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert acted.stdout.split() == ["SmoothHead", "0.1", "(7,)", "lab_arm", "True"]


def test_a_loose_folder_is_named_and_a_missing_package_is_asked_for(bare: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose_lab"
    shutil.copytree(ROOT / "tests/my_lab/my_lab", loose)
    for path in loose.rglob("*.*"):
        if path.suffix in (".yaml", ".py"):
            path.write_text(path.read_text().replace("my_lab", "loose_lab"))
    shutil.move(loose / "conf/action_head/smooth.yaml", loose / "conf/action_head/loose_smooth.yaml")
    (tmp_path / "work").mkdir()
    run = ("+debug=tiny", "action_head=loose_smooth", "trainer.max_steps=1", "save_every=1")
    refused = openvla(bare, tmp_path / "work", "train", *run, fails=True)
    assert "loose_smooth" in refused
    openvla(bare, tmp_path / "work", "train", f"plugins=[{loose}]", *run)
    code = "import openvla_lightning as o; o.Policy.from_pretrained('runs/train', device='cpu')"
    arguments = {"cwd": tmp_path / "work", "capture_output": True, "text": True}
    done = subprocess.run([bare / "python", "-c", code], **arguments)
    assert "the package loose_lab is not known here" in done.stderr
    assert "plugins=[loose_lab]" in done.stderr
    named = os.environ | {"OPENVLA_LIGHTNING_PLUGINS": str(loose)}
    subprocess.run([bare / "python", "-c", code], env=named, check=True, **arguments)
