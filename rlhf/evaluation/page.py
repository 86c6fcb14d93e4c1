"""A page of Markdown with its tables as CSV and its figures as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.evaluation.tables import write_table

if TYPE_CHECKING:
    import pandas as pd


class Page:
    """Collects a page; its tables and figures are written as they come, the page itself at the end.

    Args:
        folder: to write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blocks: list[str] = []

    def add(self, *blocks: str) -> None:
        """Add headings or paragraphs; empty ones are left out."""
        self._blocks += [block for block in blocks if block]

    def numbers(self, name: str, table: pd.DataFrame) -> None:
        """Write a table as `<name>.csv`, all columns with all digits."""
        write_table(table, self.folder / f"{name}.csv")

    def table(self, name: str, table: pd.DataFrame, columns: Sequence[str] | None = None) -> None:
        """Write a table as `<name>.csv` and show it.

        Args:
            name: of the file.
            table: its numbers.
            columns: those that are shown; by default all but `parameters`.
        """
        self.numbers(name, table)
        self.add(markdown(table[list(columns)] if columns else table.drop(columns="parameters", errors="ignore")))
        self.add(f"Numbers: [{name}.csv]({name}.csv)")

    def figure(self, name: str, draw: Callable[..., bool], *data: Any, **settings: Any) -> None:
        """Have a figure drawn to `<name>.png`, and show it if there was anything to draw."""
        file = self.folder / f"{name}.png"
        if draw(*data, file=file, **settings):
            self.add(f"![{name}]({file.name})")

    def write(self, name: str = "report.md") -> Path:
        """Write the page whole, or not at all."""
        file = self.folder / name
        partial = file.with_name(f".{name}.partial")
        partial.write_text("\n\n".join(self._blocks) + "\n")
        partial.replace(file)
        return file


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown. Columns `low` and `high` become one, "95% interval"; a missing number is an empty cell."""
    if {"low", "high"} <= set(table.columns):
        intervals = [
            "" if low != low else f"{cell(low)} to {cell(high)}"
            for low, high in zip(table["low"], table["high"], strict=True)
        ]
        table = table.assign(low=intervals).drop(columns="high").rename(columns={"low": "95% interval"})
    heads = [str(name).replace("_", " ") for name in table.columns]
    rows = [[cell(value).replace("|", "\\|") for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def cell(value: Any) -> str:
    """A value as text: three digits after the point, nothing for a missing number."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"
    return "" if value is None else str(value)
