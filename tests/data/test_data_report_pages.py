"""The data report as a page, and as a process."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import faulty_rlds
import numpy as np
import pytest
import yaml
from faulty_rlds import SPEC, chosen
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console

from openvla_lightning.config import CONF, validate
from openvla_lightning.data.report import __main__ as report
from openvla_lightning.data.report.pages import write_report
from openvla_lightning.report.page import escape, write_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the faulty dataset."""
    root = tmp_path_factory.mktemp("faulty")
    faulty_rlds.write(root / "faulty" / "1.0.0")
    return root


class Tags(HTMLParser):
    """Counts what is opened, and insists that it is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        elif tag not in ("meta", "br", "hr"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.mark.parametrize(
    "text", ["a | b", "<script>", "[x](y)", "*a* _b_ `c`", "&amp; &", "a\nb", "# 1. -", "\\", "!~"]
)
def test_words_come_through_markdown_unharmed(text: str, tmp_path: Path) -> None:
    write_page(["# t", "", "| a |", "| --- |", f"| {escape(text)} |"], tmp_path / "t.md")
    assert Tags((tmp_path / "t.html").read_text()).cells == [" ".join(text.split())]


def test_the_process_writes_everything_for_a_users_own_dataset(root: Path, tmp_path: Path) -> None:
    config = {"data": {"mix": {"faulty": 1.0}, "datasets": {"faulty": SPEC}}}
    folder = tmp_path / "conf" / "data" / "mix"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(config)}")
    command = [sys.executable, "-m", "openvla_lightning.data.report", "--config-dir", str(tmp_path / "conf")]
    command += ["data/mix=mine", "data/curriculum=drop_droid", f"paths.log_dir={tmp_path}"]
    done = subprocess.run([*command, f"paths.data_dir={root}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "saturated, share of values" in " ".join(done.stdout.split())
    (run,) = (tmp_path / "data_report" / "mine").iterdir()
    report = (run / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", report)
    assert len(pictures) == 3
    for picture in pictures:
        with Image.open(run / picture) as image:
            assert min(image.size) > 200
    tags = Tags((run / "report.html").read_text())
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert len(tags.sources) == 3
    assert "fetch <b>thing</b> 0 | now" in tags.cells


def test_missing_data_is_reported_as_in_training(tmp_path: Path) -> None:
    from openvla_lightning.run.start import data_report

    with initialize_config_dir(CONF, version_base="1.3"):
        overrides = ["data/mix=bridge", f"paths.data_dir={tmp_path}", "paths.output_dir=/tmp/out", "run_name=any"]
        cfg = compose("data_report", overrides)
    with pytest.raises(SystemExit, match=r"(?s)this run cannot start.*1 of the mixture's 1 datasets are not there"):
        data_report(cfg)


def test_frames_are_of_the_trajectories_they_name(root: Path, tmp_path: Path) -> None:
    path = write_report([chosen(root, filter_noops=False)], tmp_path, "t", Console(quiet=True))
    assert path == tmp_path / "report.md"
    with Image.open(tmp_path / "faulty_frames.jpg") as sheet:
        assert sheet.size == (6 * 128, 8 * 150)
        shades = np.array(sheet.convert("L")).astype(int)[22 + 64 :: 150, 64::128]
    assert shades.shape == (8, 6)
    assert (np.abs(shades[:, :5] - shades[:, :1]) <= 2).all()
    assert len(np.unique(shades[:, 0] // 3)) > 5


def commands() -> Iterator[str]:
    """What follows the command wherever it is shown."""
    for path in (ROOT / "docs" / "data.md", ROOT / "conf" / "data_report.yaml", Path(report.__file__)):
        yield from re.findall(r"python -m openvla_lightning\.data\.report *([^#\n`]*)", path.read_text())


@pytest.mark.parametrize("arguments", [a for a in commands() if "my_robot" not in a])
def test_a_command_that_is_shown_composes(arguments: str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        validate(compose("data_report", ["run_name=any", "paths.output_dir=/tmp/out", *arguments.split()]))
