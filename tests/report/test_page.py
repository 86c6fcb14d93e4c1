from __future__ import annotations

from pathlib import Path

import pandas as pd

from rlhf.report import charts
from rlhf.report.page import Page, markdown


def test_a_table_in_markdown() -> None:
    table = pd.DataFrame({
        "size": ["1b", None], "rows": [3, 4], "win_rate": [0.51234, float("nan")], "low": [0.4, float("nan")],
        "high": [0.6, float("nan")], "|note|": ["a|b", ""], "tiny": [1.23e-5, 0.0],
    })  # fmt: skip
    assert markdown(table).splitlines() == [
        "| size | rows | win rate | 95% interval | \\|note\\| | tiny |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1b | 3 | 0.512 | 0.400 to 0.600 | a\\|b | 1.2e-05 |",
        "|  | 4 |  |  |  | 0.000 |",
    ]


def test_what_is_short_is_in_markdown_and_all_numbers_are_written(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [1 / 3], "parameters": [7]})
    page = Page(tmp_path, {"numbers": table, "more": table, "nothing": table[:0]})
    page.section("Title")
    page.add("", "Said", short=True)
    page.table("numbers", "Above", short=True)
    page.table("nothing", "Above nothing", short=True)
    page.table("unknown")
    page.section("Empty")
    page.section("Long")
    page.table("more")
    page.write("<html>")
    assert (tmp_path / "report.md").read_text() == (
        "# Report\n\n## Title\n\nSaid\n\nAbove\n\n| x |\n| --- |\n| 0.333 |\n\n"
        "Numbers: [numbers.csv](report/numbers.csv)\n\n"
        "Curves, every other table and samples: [report.html](report.html)\n"
    )
    assert (tmp_path / "report.html").read_text() == "<html>"
    assert [section.title for section in page.sections()] == ["Title", "Long"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "report" / "numbers.csv"), table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "report" / "more.csv"), table)


def test_what_is_the_same_everywhere_is_not_shown_and_names_are_not_called_sizes(tmp_path: Path) -> None:
    table = pd.DataFrame({"size": ["x"], "parameters": [1], "seed": [3], "value": ["v"]})

    def heads(**tables: pd.DataFrame) -> list[str]:
        page = Page(tmp_path, tables)
        page.section("All")
        page.table("one")
        return list(page.sections()[0].blocks[0].heads)

    assert heads(one=table) == ["value"]
    assert heads(one=table, other=table.assign(seed=4)) == ["seed", "value"]
    assert heads(one=table, other=table.assign(size="y")) == ["run", "value"]
    assert heads(one=table, other=table.assign(size="y", parameters=5)) == ["size", "value"]
    assert list(pd.read_csv(tmp_path / "report" / "one.csv")) == ["size", "parameters", "seed", "value"]


MEANS = pd.DataFrame(
    {"size": "1b", "seed": 1, "policy": ["PPO"], "length": 3.0, "reference_length": 4.0, "win_rate": 0.5}
)
TABLES = dict.fromkeys(["kept", "gone", "new"], pd.DataFrame({"x": [1]}))


def test_a_page_replaces_an_earlier_one(tmp_path: Path) -> None:
    first = Page(tmp_path, TABLES)
    first.section("All")
    first.table("kept")
    first.numbers("gone")
    first.figure("drawn", charts.mean_lengths(MEANS, "tokens"), short=True)
    first.write()
    names = {file.name for file in (tmp_path / "report").iterdir()}
    assert names == {"kept.csv", "gone.csv", "drawn.png", "files.json"}
    for _ in range(2):
        page = Page(tmp_path, TABLES)
        page.section("All")
        page.table("kept")
        page.write()
        assert {file.name for file in (tmp_path / "report").iterdir()} == {"kept.csv", "files.json"}


def test_only_what_a_report_wrote_is_ever_deleted(tmp_path: Path) -> None:
    """What the user put beside the page and linked by hand stays."""
    first = Page(tmp_path, TABLES)
    first.section("All")
    first.table("gone")
    first.write()
    page, folder = tmp_path / "report.md", tmp_path / "report"
    mine = [tmp_path / "mine.png", folder / "mine.png", folder / "mine.csv"]
    for file in mine:
        file.write_text("x")
    links = "![mine](mine.png)\n\n![mine](report/mine.png)\n\nNumbers: [mine.csv](report/mine.csv)\n"
    page.write_text(f"{page.read_text()}\n{links}")
    second = Page(tmp_path, TABLES)
    second.section("All")
    second.table("new")
    second.write()
    assert all(file.is_file() for file in mine)
    assert not (folder / "gone.csv").exists()
