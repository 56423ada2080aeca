"""What newcomers met: what can be known is said before anything slow starts, and in their words."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from openvla_lightning.config import ConfigError
from openvla_lightning.model.hub import check_source
from openvla_lightning.report.comparison import task_mean
from openvla_lightning.report.results import Episode, Results
from openvla_lightning.report.tables import table
from openvla_lightning.run import start
from openvla_lightning.runtime.files import obey_umask


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no file or folder runs/trian; runs holds train$"):
        check_source("runs/trian")


def test_a_run_that_goes_on_with_another_model_names_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"llm": {"hidden_size": 128, "layers": 2}, "init_from": "a"}
    described = SimpleNamespace(recipe={"model": model, "action_head": {"num_bins": 256}})
    monkeypatch.setattr(start, "describe", lambda path: described)
    same = {"model": {"llm": {"hidden_size": 128, "layers": 2}, "init_from": "b"}, "action_head": {"num_bins": 256}}
    start.check_same_model("c.ckpt", same)
    other = {"model": {"llm": {"hidden_size": 64, "layers": 2}}, "action_head": {"num_bins": 128}}
    match = (
        r"c\.ckpt cannot go on with another model.*\n  model\.llm\.hidden_size: 128 -> 64\n  action_head\.num_bins: 256"
    )
    with pytest.raises(ConfigError, match=match):
        start.check_same_model("c.ckpt", other)


@pytest.mark.parametrize("success", [False, True])
def test_equal_outcomes_claim_no_certainty(success: bool) -> None:
    episodes = [Episode(f"t{i % 2}", "f", seed=i, instruction="go", success=success, length=3) for i in range(6)]
    mean, (low, high) = task_mean([Results(label="a", env="w", episodes=episodes)])
    assert mean == success
    assert high - low > 0.3


def test_the_first_column_of_a_table_is_readable_in_eighty_columns() -> None:
    header = ["run", *(f"a long column {i}" for i in range(9))]
    rows = [header, *([f"strategy=lora_{i}", *["12.3 ± 4.5"] * 9] for i in range(3))]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(rows, "Runs"))
    text = console.export_text()
    assert all(f"strategy=lora_{i}" in text for i in range(3))


def test_a_file_of_any_library_is_as_readable_as_others(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch(mode=0o600)
    before = os.umask(0o022)
    try:
        obey_umask(path)
    finally:
        os.umask(before)
    assert oct(path.stat().st_mode & 0o777) == "0o644"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_frames_show_the_grippers_value() -> None:
    from openvla_lightning.data.report.pictures import _draw_gripper, _font

    tiles = []
    for value in (0.0, 1.0):
        tile = Image.new("RGB", (126, 126), "white")
        _draw_gripper(tile, value, 0.0, 1.0)
        tiles.append(np.asarray(tile))
    assert not np.array_equal(*tiles)
    assert (tiles[1][112:] != tiles[0][112:]).any()
    assert (tiles[0][:111] == 255).all()
    shapes = [_font(13).getmask(letter).getbbox() for letter in "üéжα"]
    assert all(shapes)
