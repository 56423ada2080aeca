"""The package that docs/plugins.md has a reader write trains, and its checkpoint loads where the package is named."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_readme import EXTEND, ROOT, blocks

PAGE = ROOT / "docs" / "plugins.md"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder `my_lab` of the page, with what stands in its blocks."""
    for block in blocks(PAGE, "toml") + blocks(PAGE, "yaml"):
        (name,) = re.findall(r"^# (my_lab/\S+)$", block, re.M)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(block)
    inside = tmp_path / "my_lab" / "my_lab"
    (inside / "__init__.py").touch()
    (inside / "head.py").write_text(blocks(EXTEND, "python")[0])
    tree = next(block for block in blocks(PAGE, "") if "pyproject.toml" in block)
    listed = {Path(name).name for name in re.findall(r"\S+\.(?:toml|py|yaml)", tree)}
    assert listed == {path.name for path in package_files(tmp_path)}
    return inside


def package_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.*") if path.is_file()]


def test_the_package_of_the_page_trains_and_acts(package: Path, tmp_path: Path) -> None:
    (declared,) = tomllib.loads((package.parent / "pyproject.toml").read_text())["project"]["entry-points"].values()
    assert declared == {"my_lab": package.name}
    work = tmp_path / "work"
    work.mkdir()
    named = os.environ | {"OPENVLA_LIGHTNING_PLUGINS": str(package), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    train = [ROOT / "train.py", "+experiment=lab", "+debug=tiny", "trainer.max_steps=1", "save_every=1"]
    code = (
        "import openvla_lightning as o; policy = o.Policy.from_pretrained('runs/lab', device='cpu')\n"
        "print(type(policy.processor.action_head).__module__, policy.processor.action_head.smoothing)\n"
    )
    for command in ([*train, f"paths.log_dir={work}/runs"], ["-c", code]):
        done = subprocess.run([sys.executable, *command], cwd=work, env=named, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["my_lab.head", "0.1"]
