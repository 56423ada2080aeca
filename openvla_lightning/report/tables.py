"""Tables as lists of rows, the first of them the header: for Markdown and for a terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[list[str]]
FIRST = 16
"""Columns of a terminal that the first column keeps, however many others there are."""


def markdown(rows: Rows) -> str:
    """A table in Markdown, the first column left-aligned, the rest right-aligned."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)


def table(rows: Rows, title: str) -> "Table":
    """The same for a terminal."""
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        widest = max((len(row[index]) for row in rows), default=1)
        grid.add_column(
            name,
            justify="right" if index else "left",
            min_width=min(widest, FIRST) if index == 0 else None,  # a row without its name says nothing
            overflow="fold",
        )
    for index, row in enumerate(rows[1:], start=1):
        grid.add_row(*row, end_section=index + 1 == len(rows) - 1 and row[0].startswith(" "))
    return grid
