"""The log of a run, read back and drawn."""

from pathlib import Path

from openvla_lightning.report.training_log import draw_curves, points, read_log


def test_a_log_is_read_by_its_folder_without_the_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    (tmp_path / "metrics.csv").write_text("a,b,step\n1,,0\n,0.5,0\n3,,1\n4")
    rows = read_log(tmp_path)
    assert rows == read_log(tmp_path / "metrics.csv")
    assert points(rows, "a") == [(0, 1.0), (1, 3.0)]
    assert points(rows, "b") == [(0, 0.5)]
    assert points(rows, "c") == []


def test_curves_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    assert not draw_curves({"loss": {"one": []}}, picture)
    assert not picture.exists()
    curves = {"loss": {"one": [(0, 1.0), (1, 0.5)], "two": []}, "l1": {"one": [], "two": []}}
    for legend in (True, False):
        assert draw_curves(curves, picture, marked=["one"], legend=legend)
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
