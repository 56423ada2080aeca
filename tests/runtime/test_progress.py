"""Where there is no terminal, long work says every 30 seconds and every 5 % how far it is."""

import io
import logging

import pytest
from rich.console import Console

from openvla_lightning.runtime import progress
from openvla_lightning.runtime.progress import Bar, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == progress.__name__]


def test_a_line_every_five_per_cent_with_rate_and_time_left(clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Bar("training", 1000, "steps") as bar:
        for _ in range(1000):
            clock[0] += 0.1
            bar.advance(news="loss 1.25")
    assert len(lines(caplog)) == 20
    assert lines(caplog)[0] == "training: 50 of 1,000 steps (5%), 10 steps/s, 0:01:35 left, loss 1.25"
    assert lines(caplog)[-1] == "training: 1,000 of 1,000 steps (100%), 10 steps/s, loss 1.25"


def test_slow_work_says_so_every_thirty_seconds(clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Bar("training", None, "steps", done=7) as bar:
        for _ in range(10):
            clock[0] += 10
            bar.advance()
    assert lines(caplog)[0] == "training: 10 steps, 0.1 steps/s"  # three of its own in thirty seconds
    assert len(lines(caplog)) == 4  # and one at the end


def test_work_that_is_usually_short_is_silent_unless_it_lasts(clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(track(range(100), "indexing", visible=False)) == list(range(100))
    assert not lines(caplog)
    for _ in track(range(4), "indexing", visible=False):
        clock[0] += 31
    assert len(lines(caplog)) == 4


def test_quick_work_does_not_fill_a_log(clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in track(range(6000), "indexing", unit="frames"):
        clock[0] += 1 / 4096
    (first, last) = lines(caplog)
    assert first.startswith("indexing: 4,096 of 6,000 frames (68%), 4,096 frames/s")
    assert last == "indexing: 6,000 of 6,000 frames (100%), 4,096 frames/s"


def test_work_that_ends_before_its_total_is_whole_all_the_same(clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(track(iter(range(3)), "replaying", 20, "episodes")) == [0, 1, 2]
    assert lines(caplog)[-1].startswith("replaying: 3 of 3 episodes (100%)")


def test_in_a_terminal_it_is_a_bar(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Bar("training", 4, console=console) as bar:
        bar.update(3, "loss 0.5")
    shown = console.file.getvalue()
    assert "3/4" in shown
    assert "loss 0.5" in shown
    assert not lines(caplog)


def test_without_logging_the_lines_go_to_stderr(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    list(track(range(2), "indexing", unit="files"))
    assert "indexing: 2 of 2 files (100%)" in capsys.readouterr().err
