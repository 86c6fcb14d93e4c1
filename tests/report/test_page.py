from __future__ import annotations

from pathlib import Path

import pandas as pd

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


def test_a_page_is_written_with_its_numbers(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [1 / 3], "parameters": [7]})
    page = Page(tmp_path, {"numbers": table, "nothing": table[:0]})
    page.add("# Title", "")
    page.table("numbers", "Above")
    page.table("nothing", "Above nothing")
    page.table("unknown")
    page.figure("something", lambda file: file.write_text("x"))
    page.write()
    assert (tmp_path / "report.md").read_text() == (
        "# Title\n\nAbove\n\n| x |\n| --- |\n| 0.333 |\n\nNumbers: [numbers.csv](report/numbers.csv)\n\n"
        "![something](report/something.png)\n"
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "report" / "numbers.csv"), table)


TABLES = dict.fromkeys(["kept", "gone", "new"], pd.DataFrame({"x": [1]}))


def test_a_page_replaces_an_earlier_one(tmp_path: Path) -> None:
    first = Page(tmp_path, TABLES)
    first.table("kept")
    first.numbers("gone", "Everything, of every run")
    first.figure("drawn", lambda file: file.write_text("x"))
    first.write()
    names = {file.name for file in (tmp_path / "report").iterdir()}
    assert names == {"kept.csv", "gone.csv", "drawn.png", "files.json"}
    for _ in range(2):
        page = Page(tmp_path, TABLES)
        page.table("kept")
        page.write()
        assert {file.name for file in (tmp_path / "report").iterdir()} == {"kept.csv", "files.json"}


def test_only_what_a_report_wrote_is_ever_deleted(tmp_path: Path) -> None:
    """What the user put beside the page and linked by hand stays."""
    first = Page(tmp_path, TABLES)
    first.table("gone")
    first.write()
    page, folder = tmp_path / "report.md", tmp_path / "report"
    mine = [tmp_path / "mine.png", folder / "mine.png", folder / "mine.csv"]
    for file in mine:
        file.write_text("x")
    links = "![mine](mine.png)\n\n![mine](report/mine.png)\n\nNumbers: [mine.csv](report/mine.csv)\n"
    page.write_text(f"{page.read_text()}\n{links}")
    second = Page(tmp_path, TABLES)
    second.table("new")
    second.write()
    assert all(file.is_file() for file in mine)
    assert not (folder / "gone.csv").exists()
