"""A page of Markdown with its tables as CSV and its figures as PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import files
from rlhf.evaluation.tables import write_table

if TYPE_CHECKING:
    import pandas as pd


FILES = "report"
LINK = re.compile(  # of a table or a figure, also of a page whose files lie beside it
    rf"^(?:!\[\w+\]|[A-Z][\w ,]*: \[\w+\.csv\])\(((?:{FILES}/)?\w+\.(?:csv|png))\)$", re.MULTILINE
)


class Page:
    """Collects a page; its tables and figures are written as they come, the page itself at the end.

    It takes the place of an earlier page in the same folder: files to which only that one links are deleted.

    Args:
        folder: to write the page to; tables and figures go to the folder `report` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files.claim(str(folder / FILES), resuming=True, setting="output")
        self._blocks: list[str] = []

    def add(self, *blocks: str) -> None:
        """Adds headings or paragraphs; empty ones are left out."""
        self._blocks += [block for block in blocks if block]

    def numbers(self, name: str, table: pd.DataFrame, title: str = "Numbers") -> None:
        """Writes a table as `<name>.csv`, all columns with all digits, and links to it."""
        write_table(table, self.folder / FILES / f"{name}.csv")
        self.add(f"{title}: [{name}.csv]({FILES}/{name}.csv)")

    def table(self, name: str, table: pd.DataFrame, columns: Sequence[str] | None = None) -> None:
        """Writes a table as `<name>.csv` and shows it.

        Args:
            name: of the file.
            table: its numbers.
            columns: those that are shown; by default all but `parameters`.
        """
        self.add(markdown(table[list(columns)] if columns else table.drop(columns="parameters", errors="ignore")))
        self.numbers(name, table)

    def figure(self, name: str, draw: Callable[..., bool], *data: Any, **settings: Any) -> None:
        """Has a figure drawn to `<name>.png`, and shows it if there was anything to draw."""
        file = f"{FILES}/{name}.png"
        if draw(*data, file=self.folder / file, **settings):
            self.add(f"![{name}]({file})")

    def write(self, name: str = "report.md") -> Path:
        """Writes the page whole, or not at all; then deletes what belonged to the earlier one alone."""
        file, text = self.folder / name, "\n\n".join(self._blocks) + "\n"
        before = file.read_text() if file.is_file() else ""
        partial = file.with_name(f".{name}.partial")
        partial.write_text(text)
        partial.replace(file)
        for left in set(LINK.findall(before)) - set(LINK.findall(text)):
            (self.folder / left).unlink(missing_ok=True)
        return file


def markdown(table: pd.DataFrame) -> str:
    """Formats a table as Markdown, as of `presented`."""
    heads, rows = presented(table)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def presented(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table as texts. Columns `low` and `high` become one, "95% interval"."""
    if {"low", "high"} <= set(table.columns):
        intervals = [
            "" if low != low else f"{cell(low)} to {cell(high)}"
            for low, high in zip(table["low"], table["high"], strict=True)
        ]
        table = table.assign(low=intervals).drop(columns="high").rename(columns={"low": "95% interval"})
    heads = [str(name).replace("_", " ") for name in table.columns]
    return heads, [[cell(value) for value in row] for row in table.itertuples(index=False)]


def cell(value: Any) -> str:
    """A value as text: three digits after the point (of tiny ones two in all), nothing for a missing number."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
    return "" if value is None else str(value)
