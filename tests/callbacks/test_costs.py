"""What a run cost is measured where that can be, and ends no training where it cannot."""

from pathlib import Path
from typing import Any

import pytest

from openvla_lightning.callbacks import costs
from openvla_lightning.callbacks.costs import Costs, peak_resident_bytes


def test_a_switch_that_nobody_may_write_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody: Any = None
    monkeypatch.setattr(costs, "SWITCH", tmp_path)  # it is there, and writing to it is an OSError
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Costs(str(tmp_path)).setup(nobody, nobody, "fit")
    assert peak_resident_bytes() > 1e6
