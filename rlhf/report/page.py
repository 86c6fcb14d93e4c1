"""A page of Markdown with its tables as CSV and its figures as PNG."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf import files
from rlhf.evaluation.tables import write_table

FILES = "report"
WRITTEN = "files.json"  # the names of the tables and figures of the page


class Page:
    """Collects a page; its tables and figures are written as they come, the page itself at the end.

    It replaces an earlier page in the same folder: tables and figures of that page that this one lacks are deleted.
    A table that is not among `tables` counts as empty.
    """

    def __init__(self, folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
        self.folder, self.tables = folder, defaultdict(pd.DataFrame, tables)
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        self._blocks: list[str] = []
        self._written: list[str] = []

    def add(self, *blocks: str) -> None:
        """Adds headings or paragraphs; empty ones are left out."""
        self._blocks += [block for block in blocks if block]

    def numbers(self, name: str, title: str = "Numbers") -> None:
        """Writes a table as `<name>.csv`, all columns with all digits, and links to it."""
        write_table(self.tables[name], self._file(f"{name}.csv"))
        self.add(f"{title}: [{name}.csv]({FILES}/{name}.csv)")

    def table(self, name: str, *intro: str, columns: Sequence[str] = ()) -> None:
        """Writes a table as `<name>.csv` and shows it (by default without `parameters`), unless it is empty."""
        table = self.tables[name]
        if len(table):
            shown = table[list(columns)] if columns else table.drop(columns="parameters", errors="ignore")
            self.add(*intro, markdown(shown))
            self.numbers(name)

    def figure(self, name: str, draw: Callable[..., None], *data: Any, **settings: Any) -> None:
        """Has a figure drawn to `<name>.png`, and shows it."""
        with files.replacing(self._file(f"{name}.png")) as partial:
            draw(*data, file=partial, **settings)
        self.add(f"![{name}]({FILES}/{name}.png)")

    def _file(self, name: str) -> Path:
        self._written.append(name)
        return self.folder / FILES / name

    def write(self) -> None:
        """Writes report.md whole, or not at all; then deletes what an earlier page wrote and this one did not."""
        written = self.folder / FILES / WRITTEN
        before = json.loads(written.read_text()) if written.is_file() else []
        files.write_text(self.folder / "report.md", "\n\n".join(self._blocks) + "\n")
        for left in set(before) - set(self._written):
            (self.folder / FILES / left).unlink(missing_ok=True)
        files.write_text(written, json.dumps(self._written, indent=2) + "\n")


def markdown(table: pd.DataFrame) -> str:
    """Formats a table as Markdown. Columns `low` and `high` become one, "95% interval"."""
    if {"low", "high"} <= set(table.columns):
        ends = zip(table["low"], table["high"], strict=True)
        intervals = ["" if pd.isna(low) else f"{cell(low)} to {cell(high)}" for low, high in ends]
        table = table.assign(low=intervals).drop(columns="high").rename(columns={"low": "95% interval"})
    heads = [str(name).replace("_", " ") for name in table]
    rows = [[cell(value) for value in row] for row in table.itertuples(index=False)]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Formats a value: three digits after the point (two significant ones if tiny), nothing for a missing number."""
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
    return str(value)
