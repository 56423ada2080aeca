"""Progress of long work, as a bar in a terminal, or as occasional lines in a file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
EVERY_SHARE = 0.05
"""Without a terminal, a line is written after this share of the work or this time since the last line."""
AT_LEAST_SECONDS = 1.0
"""Time between two lines, so that short work does not fill a log."""

T = TypeVar("T")


class Bar:
    """Shows how much of some work is done, its rate, and the remaining time.

    In a terminal, this is a bar. Elsewhere (a file, Slurm's log), it is a line every 30 seconds, and at least every 5 %
    of the work unless these take less than a second. Lines go through `logging` if that is configured, so that a run's
    log has them, otherwise to stderr.

    Args:
        label: name of the work.
        total: amount of work; None: unknown.
        unit: unit of the work, in the plural.
        done: amount that was done before.
        visible: False for work that is usually short: no bar, and a line only every 30 seconds.
        console: output of bar or lines; None: a bar to stderr, lines to the log.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "steps",
        *,
        done: int = 0,
        visible: bool = True,
        console: Console | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.done, self.visible = label, total, unit, done, visible
        self.news, self._first, self._console = "", done, console
        console = console or Console(stderr=True)
        self._began = self._said = time.monotonic()
        self._said_done = done
        self._rich: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(unit))
            self._rich = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[news]}", markup=False),
                console=console, disable=not visible,
            )  # fmt: skip
            self._task = self._rich.add_task(label, total=total, completed=done, news="")

    def __enter__(self) -> Self:
        self._began = self._said = time.monotonic()
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif error_type is None and self.visible and self._said_done != self.done:
            self._say()

    def advance(self, by: int = 1, news: str | None = None) -> None:
        """Count `by` more as done; `news` is text to show, such as a loss."""
        self.update(self.done + by, news)

    def update(self, done: int, news: str | None = None) -> None:
        """Set the total amount that is done."""
        self.done, self.news = done, self.news if news is None else news
        if self._rich is None and not self.due(done):
            return
        if self._rich is not None:
            self._rich.update(self._task, completed=done, news=self.news)
            return
        self._say()

    @property
    def drawn(self) -> bool:
        """Whether there is a bar in a terminal."""
        return self._rich is not None

    def due(self, done: int) -> bool:
        """Whether `update(done)` would write anything; otherwise the caller need not compute news."""
        if self._rich is not None:
            return True
        share = (done - self._said_done) / self.total if self.total else 0.0
        waited = time.monotonic() - self._said
        much = self.visible and share >= EVERY_SHARE - 1e-9 and waited >= AT_LEAST_SECONDS
        return done != self._said_done and (much or waited >= EVERY_SECONDS)

    def describe(self, label: str) -> None:
        """Change the label while other work is being done."""
        if self._rich is not None:
            self._rich.update(self._task, description=label)

    def restart(self, label: str, total: int | None, done: int = 0) -> None:
        """Restart for the actual work, so that earlier work does not count for its rate."""
        self.label, self.total, self.done, self._first = label, total, done, done
        self._began = self._said = time.monotonic()
        self._said_done = done
        if self._rich is not None:
            self._rich.reset(self._task, description=label, total=total, completed=done)

    def end(self) -> None:
        """Say that the work is over: there was no more of it than what is done, although `total` allowed for more."""
        if self.total is not None and self.total != self.done:
            self.total, self._said_done = self.done, -1  # the last line is written again, with the true total
            if self._rich is not None:
                self._rich.update(self._task, total=self.done)

    def say(self, text: str) -> None:
        """Write a separate line, above a bar."""
        if self._rich is not None and not logging.getLogger().handlers:
            self._rich.console.print(text, highlight=False, markup=False)
        else:
            self._write(text)

    @property
    def text(self) -> str:
        """The line: done and total amount, rate, remaining time, and the news."""
        seconds, done = time.monotonic() - self._began, self.done - self._first
        rate = done / seconds if seconds > 0 else 0.0
        of = "" if self.total is None else f" of {self.total:,}"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        parts = [f"{self.label}: {self.done:,}{of} {self.unit}{share}"]
        if done and rate:
            parts.append(f"{_short(rate)} {self.unit}/s")
            if self.total is not None and self.total > self.done:
                parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        return ", ".join([*parts, *[self.news] * bool(self.news)])

    def _say(self) -> None:
        self._said, self._said_done = time.monotonic(), self.done
        self._write(self.text)

    def _write(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif logging.getLogger().handlers and log.isEnabledFor(logging.INFO):
            log.info(text)
        else:
            print(text, file=sys.stderr, flush=True)


def track(work: Iterable[T], label: str, total: int | None = None, unit: str = "steps", **options: Any) -> Iterator[T]:
    """Yield the items of `work`, at most `total`, and show the progress; the options are those of `Bar`."""
    known = len(work) if total is None and isinstance(work, Sized) else total
    with Bar(label, known, unit, **options) as bar:
        for item in work:
            yield item
            bar.advance()
        bar.end()


def _short(rate: float) -> str:
    """Three digits of a rate, without an exponent."""
    return f"{rate:.3g}" if rate < 999.5 else f"{rate:,.0f}"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_short(speed)} {self.unit}/s" if speed else "", style="dim")
