"""A progress bar with a rate and the time left, for passes that take minutes."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self.unit}" if task.speed else "", style="dim")


@contextmanager
def progress_bar(
    label: str, unit: str, total: int, done: int = 0, visible: bool = True
) -> Iterator[tuple[Progress, TaskID]]:
    """Show `done` of `total`, in `unit` such as `frames/s`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, disable=not visible) as bar:
        yield bar, bar.add_task(label, total=total, completed=done)
