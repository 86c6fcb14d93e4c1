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
    page = Page(tmp_path)
    page.add("# Title", "")
    table = pd.DataFrame({"x": [1 / 3], "parameters": [7]})
    page.table("numbers", table)
    page.figure("nothing", lambda file: False)
    page.figure("something", lambda file: True)
    assert page.write() == tmp_path / "report.md"
    assert (tmp_path / "report.md").read_text() == (
        "# Title\n\n| x |\n| --- |\n| 0.333 |\n\nNumbers: [numbers.csv](report/numbers.csv)\n\n"
        "![something](report/something.png)\n"
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "report" / "numbers.csv"), table)


def test_a_page_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [1]})
    mine = tmp_path / "report" / "mine.csv"
    first = Page(tmp_path)
    first.table("kept", table)
    first.numbers("gone", table, "Everything, of every run")
    first.figure("drawn", lambda file: bool(file.write_text("x")))
    mine.write_text("x")
    first.add("> Numbers: [mine.csv](report/mine.csv)")  # in a sample
    first.write()
    assert len(list(mine.parent.iterdir())) == 4
    second = Page(tmp_path)
    second.table("kept", table)
    second.write()
    assert sorted(file.name for file in mine.parent.iterdir()) == ["kept.csv", "mine.csv"]


def test_a_page_takes_the_place_of_one_whose_files_lie_beside_it(tmp_path: Path) -> None:
    for name in ("kept.csv", "gone.png", "mine.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "report.md").write_text("# Title\n\nNumbers: [kept.csv](kept.csv)\n\n![gone](gone.png)\n")
    page = Page(tmp_path)
    page.table("kept", pd.DataFrame({"x": [1]}))
    page.write()
    assert {file.name for file in tmp_path.iterdir()} == {"mine.csv", "report.md", "report"}
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["kept.csv"]
