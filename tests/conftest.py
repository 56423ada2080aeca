"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tensors here are small: more threads mostly wait for each other


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden numbers made by the released code (environment variable OPENVLA_GOLDEN)."""
    folder = os.environ.get("OPENVLA_GOLDEN")
    if not folder:
        pytest.skip("OPENVLA_GOLDEN is not set: no golden numbers to compare with")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"OPENVLA_GOLDEN={folder} is not a folder")
    return path
