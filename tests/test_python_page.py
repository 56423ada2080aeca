"""What docs/python.md writes down runs as it stands, in the order of the page."""

from functools import partial
from pathlib import Path

import pytest
from test_readme import ROOT, blocks

from openvla_lightning import demonstrations
from openvla_lightning.data.source.writer import write_rlds


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tabletop_pretrain"
    make = partial(demonstrations.episode, name)
    write_rlds(tmp_path / "data" / name / "1.0.0", demonstrations.features(), {"train": 4, "val": 1}, make)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENVLA_LIGHTNING_ROOT", str(tmp_path))
    found: dict[str, object] = {"__name__": "page"}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        exec(block, found)
    assert found["action"].shape == (7,)  # type: ignore[attr-defined]
    assert found["chunk"].shape == (1, 8, 7)  # type: ignore[attr-defined]
    assert (tmp_path / "mine" / "report.html").exists()
