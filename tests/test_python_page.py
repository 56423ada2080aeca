"""What docs/python.md and the notebook write down runs as it stands, in the order of the page."""

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
from test_readme import ROOT, blocks

from openvla_lightning import demonstrations
from openvla_lightning.data.source.writer import write_rlds

NOTEBOOK = ROOT / "docs" / "laptop.ipynb"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(blocks: Iterable[str]) -> dict[str, object]:
    """Run blocks of code one after the other, as a reader does; return the names they leave."""
    found: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(block, found)
    return found


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tabletop_pretrain"
    make = partial(demonstrations.episode, name)
    write_rlds(tmp_path / "data" / name / "1.0.0", demonstrations.features(), {"train": 4, "val": 1}, make)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENVLA_LIGHTNING_ROOT", str(tmp_path))
    found = run(blocks(ROOT / "docs" / "python.md", "python"))
    assert found["action"].shape == (7,)  # type: ignore[attr-defined]
    assert found["chunk"].shape == (1, 8, 7)  # type: ignore[attr-defined]
    assert (tmp_path / "mine" / "report.html").exists()
    more = next(block for block in blocks(ROOT / "docs" / "python.md", "python") if "compose(" in block)
    run([more.replace('"paths.output_dir=mine"', '"paths.output_dir=mine", "ckpt_path=mine", "trainer.max_steps=22"')])
    assert (tmp_path / "mine" / "checkpoints" / "step_000022.ckpt").exists(), "it went on as the page says"


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = ["".join(cell["source"]) for cell in cells]
    sizes = re.compile(r"^EPISODES, STEPS = \d+, \d+$", re.M)
    assert sizes.search(code[0])
    code[0] = sizes.sub("EPISODES, STEPS = 12, 2", code[0])
    shown = "for seed in EVALUATION_SEEDS[:20]]"
    assert sum(shown in block for block in code) == 1
    monkeypatch.chdir(tmp_path)
    found = run(block.replace(shown, "for seed in EVALUATION_SEEDS[:3]]") for block in code)
    assert len(found["episodes"]) == 3  # type: ignore[arg-type]
    assert found["picture"].width > 300  # type: ignore[attr-defined]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "all is written below runs/laptop"


def test_the_notebook_shows_what_it_gave_and_stays_small() -> None:
    assert NOTEBOOK.stat().st_size < 400_000
    book = json.loads(NOTEBOOK.read_text())
    kinds = [kind for cell in book["cells"] for shown in cell.get("outputs", []) for kind in shown.get("data", {})]
    assert kinds.count("image/jpeg") == 3
    assert "image/png" not in kinds
    linked = re.findall(
        r"\]\(([^)#]+)", " ".join("".join(c["source"]) for c in book["cells"] if c["cell_type"] == "markdown")
    )
    assert linked
    assert not [page for page in linked if not (NOTEBOOK.parent / page).exists()]
