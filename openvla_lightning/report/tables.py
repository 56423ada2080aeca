"""Tables as lists of rows, the first of them the header: for Markdown and for a terminal."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Rows = list[list[str]]
FIRST = 16
"""Columns of a terminal that the first column keeps, however many others there are."""


def markdown(rows: Rows) -> str:
    """A table in Markdown, the first column left-aligned, the rest right-aligned; a bar in a cell stays in the cell."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    cells = ([re.sub(r"(?<!\\)\|", r"\|", cell.strip()) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def table(rows: Rows, title: str) -> "Table":
    """The same for a terminal. Brackets in cells are brackets, not rich's markup."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title), title_justify="left")
    for index, name in enumerate(rows[0]):
        widest = max((len(row[index]) for row in rows), default=1)
        grid.add_column(
            Text(name),
            justify="right" if index else "left",
            min_width=min(widest, FIRST) if index == 0 else None,  # a row without its name says nothing
            overflow="fold",
        )
    for index, row in enumerate(rows[1:], start=1):
        grid.add_row(*map(Text, row), end_section=index + 1 == len(rows) - 1 and row[0].startswith(" "))
    return grid


def say(console: "Console", text: str) -> None:
    """Print a text as it is, on one line: a path in it can be copied, and brackets are brackets."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def fitting(rows: Rows, title: str, width: int) -> "list[Table]":
    """The same for a terminal of so many columns: as many tables as it takes, each with the first column."""
    widths = [max(len(row[index]) for row in rows) + 3 for index in range(len(rows[0]))]
    widths[0] = min(widths[0], width // 2)  # a long name is folded
    parts: list[list[int]] = [[]]
    for index in range(1, len(widths)):
        if parts[-1] and 1 + widths[0] + sum(widths[i] for i in [*parts[-1], index]) > width:
            parts.append([])
        parts[-1].append(index)
    return [table([[row[0], *(row[i] for i in part)] for row in rows], title) for part in parts]
