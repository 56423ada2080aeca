"""A training run on one page."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from openvla_lightning.callbacks.samples import Sample, draw
from openvla_lightning.report.__main__ import main
from openvla_lightning.report.results import Episode, Results
from openvla_lightning.report.run_page import metric_rows, write_run_page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of four steps leaves, without its checkpoints."""
    folder = tmp_path / "train" / "2026-11-28_12-00-00"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(
        yaml.safe_dump(["action_head=l1", "data.cameras=[primary,wrist]"])
    )
    (folder / "metrics.csv").write_text("step,train/loss,val/loss,val/l1\n0,2.5,,\n1,1.25,,\n1,,1.5,0.125\n")
    random = np.random.default_rng(0)
    samples = [
        Sample(random.integers(0, 256, (32, 64, 3), dtype=np.uint8), prompt, "mine", true, true + 0.1, 0.1)
        for prompt in ("In: What action should the robot take to open the drawer?\nOut:", "another kind of prompt")
        for true in (random.normal(size=(4, 7)),)
    ]
    draw(samples, folder / "samples.png")
    return folder


def test_the_last_value_of_each_metric_is_shown_with_its_step(run: Path) -> None:
    assert metric_rows(run) == [
        ["", "training", "held out"],
        ["loss", "1.25 (step 1)", "1.5 (step 1)"],
        ["l1", "-", "0.125 (step 1)"],
    ]


def test_a_page_holds_what_was_typed_the_pictures_and_the_rollouts(run: Path) -> None:
    episode = Episode("lift_cube", "lift", 1, "pick up the cube", True, 12, video="videos/a.mp4")
    Results("mine", "tabletop", "new", episodes=[episode]).save(run / "evaluation")
    page = write_run_page(run).with_suffix(".html").read_text()
    assert "<code>data.cameras=[primary,wrist]</code>" in page
    assert page.count("data:image/png;base64,") == 1, "there is a picture of samples, none of curves"
    assert 'src="evaluation/videos/a.mp4"' in page
    assert "1 of 1" in page


def test_the_report_command_writes_the_page_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run)])
    assert f"written to {run / 'report.md'}" in capsys.readouterr().out
    assert (run / "report.html").exists()


def test_predictions_that_are_no_numbers_are_drawn_all_the_same(tmp_path: Path) -> None:
    image, nothing = np.zeros((8, 8, 3), np.uint8), np.full((1, 7), np.nan)
    for predicted in (nothing, nothing + np.inf):
        draw([Sample(image, "push", "mine", nothing, predicted, float("nan"))], tmp_path / "samples.png")
        assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
