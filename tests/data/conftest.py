"""The toy dataset, written once, and the real Bridge sample."""

import shutil
from pathlib import Path

import pytest
import toy_rlds


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the toy dataset in it; read only, by agreement."""
    root = tmp_path_factory.mktemp("data")
    toy_rlds.write(root / "toy" / "1.0.0")
    return root


@pytest.fixture(scope="session")
def bridge_root(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with 25 real trajectories of Bridge V2."""
    root = tmp_path_factory.mktemp("bridge")
    shutil.copytree(golden / "data" / "bridge_sample" / "bridge_dataset", root / "bridge_dataset")
    return root
