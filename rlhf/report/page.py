"""A page, collected once and written twice: all of it as report.html, what is short as report.md, tables as CSV."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from rlhf import files
from rlhf.evaluation.tables import write_table

if TYPE_CHECKING:
    import altair as alt

FILES = "report"
SAMPLES = "Samples"  # the section that report.html has the browser of samples for
WRITTEN = "files.json"  # the names of the tables and figures of the page


class Block(NamedTuple):
    """A paragraph, a table or a figure; what is not `short` is shown in report.html only."""

    short: bool
    text: str = ""  # Markdown; of a table, what stands above it
    name: str = ""  # of the table or the figure
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    panels: Mapping[str, Any] = {}  # title -> chart


class Section(NamedTuple):
    """A heading with its blocks."""

    title: str
    blocks: list[Block]


class Page:
    """Collects a page; its tables are written as they come, the page itself at the end.

    It replaces an earlier page in the same folder: tables and figures of that page that this one lacks are deleted.
    A table that is not among `tables` counts as empty. Where there is one size or seed only, no table shows it.
    """

    def __init__(self, folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
        self.folder, self.tables = folder, defaultdict(pd.DataFrame, tables)
        found = {name: _values(tables, name) for name in ("size", "seed")}
        self._alike = ["parameters", *(name for name, values in found.items() if len(values) <= 1)]
        self._heads = {} if _values(tables, "parameters") - {1} else {"size": "run"}  # sizes are mere names
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        self._sections: list[Section] = []
        self._written: list[str] = []

    def section(self, title: str) -> None:
        """Begins a section; one that stays empty is not shown."""
        self._sections.append(Section(title, []))

    def add(self, *texts: str, short: bool = False) -> None:
        """Adds paragraphs of Markdown; empty ones are left out."""
        self._sections[-1].blocks.extend(Block(short, text) for text in texts if text)

    def numbers(self, name: str) -> None:
        """Writes a table as `<name>.csv`, all columns with all digits."""
        write_table(self.tables[name], self._file(f"{name}.csv"))

    def table(self, name: str, *intro: str, columns: Sequence[str] = (), short: bool = False) -> None:
        """Writes a table as `<name>.csv` and shows it, or some of its columns, unless it is empty."""
        table = self.tables[name]
        if len(table):
            shown = table[list(columns)] if columns else table
            shown = shown.drop(columns=self._alike, errors="ignore").rename(columns=self._heads)
            self.numbers(name)
            self._sections[-1].blocks.append(Block(short, "\n\n".join(intro), name, *texts(shown)))

    def figure(self, name: str, panels: Mapping[str, "alt.TopLevelMixin"], short: bool = False) -> None:
        """Shows charts, by title, beside each other; a short figure is written as `<name>.png` too."""
        self._sections[-1].blocks.append(Block(short, "", name, panels=panels))

    def sections(self) -> list[Section]:
        """Returns the sections that have anything in them."""
        return [section for section in self._sections if section.blocks]

    def write(self, html: str = "") -> None:
        """Writes report.md and report.html whole; then deletes what an earlier page wrote and this one did not."""
        written = self.folder / FILES / WRITTEN
        before = json.loads(written.read_text()) if written.is_file() else []
        lines = ["# Report"]
        for title, blocks in self.sections():
            shown = [self._short(block) for block in blocks if block.short]
            lines += [f"## {title}", *shown] if shown else []
        page = self.folder / "report.html"
        more = "Curves, every other table and samples: [report.html](report.html)" if html else ""
        if html:
            files.write_text(page, html)
        files.write_text(self.folder / "report.md", "\n\n".join([*lines, *filter(None, [more])]) + "\n")
        for left in set(before) - set(self._written):
            (self.folder / FILES / left).unlink(missing_ok=True)
        files.write_text(written, json.dumps(self._written, indent=2) + "\n")

    def _short(self, block: Block) -> str:
        if block.panels:
            from rlhf.report.charts import save_png

            with files.replacing(self._file(f"{block.name}.png")) as partial:
                save_png(block.panels, partial)
            return f"![{block.name}]({FILES}/{block.name}.png)"
        if block.name:
            link = f"Numbers: [{block.name}.csv]({FILES}/{block.name}.csv)"
            return "\n\n".join(filter(None, [block.text, _lines(block.heads, block.rows), link]))
        return block.text

    def _file(self, name: str) -> Path:
        self._written.append(name)
        return self.folder / FILES / name


def _values(tables: Mapping[str, pd.DataFrame], column: str) -> set[Any]:
    return set().union(*(table[column] for table in tables.values() if column in table))


def texts(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Formats a table: its heads, and its rows. Columns `low` and `high` become one, "95% interval"."""
    if {"low", "high"} <= set(table.columns):
        ends = zip(table["low"], table["high"], strict=True)
        intervals = ["" if pd.isna(low) else f"{cell(low)} to {cell(high)}" for low, high in ends]
        table = table.assign(low=intervals).drop(columns="high").rename(columns={"low": "95% interval"})
    heads = [str(name).replace("_", " ") for name in table]
    return heads, [[cell(value) for value in row] for row in table.itertuples(index=False)]


def markdown(table: pd.DataFrame) -> str:
    """Formats a table as Markdown, see `texts`."""
    return _lines(*texts(table))


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Formats a value: three digits after the point (two significant ones if tiny), nothing for a missing number."""
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
    return str(value)
