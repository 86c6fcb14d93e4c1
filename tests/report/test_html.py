"""report.html in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf.evaluation.tables import read_table, write_table
from rlhf.report.page import cell
from rlhf.report.report import report
from tests.report.test_report import make_run

HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run whose texts, policies and judge would like to be HTML."""
    folder = tmp_path_factory.mktemp("html")
    run = make_run(folder, checkpoints=False)
    tables = {label: read_table(path, label) for label, path in run.policies.items()}
    for label, table in tables.items():
        hostile = table["query"] + HOSTILE + " ![x](http://example.com/x.png) </script>"
        write_table(table.assign(query=hostile, a=table["a"] + HOSTILE, judge=HOSTILE), Path(run.policies[label]))
    report(str(folder / "out"), [replace(run, policies={**run.policies, HOSTILE: run.policies["SFT"]})])
    return folder / "out"


@pytest.fixture
def opened(open_file: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Opens the page."""
    return partial(open_file, folder / "report.html")


def test_the_page_is_one_small_file_that_draws_its_charts(opened: Callable[..., Any], folder: Path) -> None:
    assert (folder / "report.html").stat().st_size < 2_000_000
    page = opened()
    titles = page.locator("figcaption").all_inner_texts()
    for title in ("Win rate by length", "Calibration on posts", "Score of the reward model and KL", "Ratio"):
        assert title in titles
    assert page.locator(".chart svg path.mark-line, .chart svg .mark-line path").count() > 10


def test_the_tables_of_the_page_are_those_of_the_files(opened: Callable[..., Any], folder: Path) -> None:
    page = opened()
    shown = {table.get_attribute("id"): table for table in page.locator("table[id]").all()}
    assert len(shown) > 12
    for name, table in shown.items():
        frame = pd.read_csv(folder / "report" / f"{name.removeprefix('table-')}.csv")
        heads = table.locator("th").all_text_contents()
        rows = [row.locator("td").all_text_contents() for row in table.locator("tbody tr").all()]
        assert len(rows) == len(frame), name
        for index, head in enumerate(heads):
            column = head.replace(" ", "_")
            if column in frame and frame[column].dtype == float and head != "value":
                assert [row[index] for row in rows] == list(map(cell, frame[column])), (name, head)


def test_the_headline_and_its_numbers_are_those_of_the_tables(opened: Callable[..., Any], folder: Path) -> None:
    page = opened()
    row = pd.read_csv(folder / "report" / "summary.csv").set_index("policy").loc["PPO"]
    assert f"PPO's responses are preferred over the reference {row['win_rate']:.0%} of the time" in page.inner_text(
        "h1"
    )
    cards = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd.value").all_inner_texts(), strict=True))
    assert cards == {
        "Win rate": f"{row['win_rate']:.1%}", "Score": f"{row['score']:.2f}", "Gold score": f"{row['gold']:.2f}",
        "KL": "10.00",
    }  # fmt: skip
    assert f"{row['low']:.1%} to {row['high']:.1%}" in page.locator("dd.note").first.inner_text()


def test_text_that_looks_like_html_is_shown_as_text(opened: Callable[..., Any]) -> None:
    page = opened()
    assert HOSTILE in page.locator("#table-summary").inner_text()
    assert page.locator("img").count() == 0
    assert HOSTILE in page.inner_text("#samples .query")
    assert HOSTILE in page.locator("#samples .written").last.inner_text()
    assert page.locator("h2", has_text="Samples").count() == 1  # the few of report.md are not here, too
    assert "![x](http://example.com/x.png)" in page.inner_text("main")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_it_fits_and_can_be_read(opened: Callable[..., Any], width: int, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for place in ("body", ".note", "a", "th", ".chart svg .role-axis-label text"):
        script = "each => [getComputedStyle(each).color, getComputedStyle(each).fill]"
        colour, fill = page.locator(place).first.evaluate(script)
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert contrast(fill if "svg" in place else colour, back) > 4.5, place


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_printing_opens_what_is_folded(opened: Callable[..., Any]) -> None:
    page = opened()
    assert page.locator("details[open]").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details[open]").count() == page.locator("details").count() > 10
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()


def test_a_point_under_the_mouse_shows_its_numbers_and_dragging_moves_the_chart(opened: Callable[..., Any]) -> None:
    page = opened()
    chart = page.locator("figure", has_text="Win rate and mean length").locator("svg")
    chart.locator(".mark-symbol.role-mark path").last.hover()
    shown = page.locator("#vg-tooltip-element").inner_text()
    assert "win_rate" in shown
    assert HOSTILE[:30] in shown  # a name that would like to be HTML
    before = chart.locator(".role-axis-label").first.inner_html()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 120)
    page.mouse.down()
    page.mouse.move(box["x"] + 320, box["y"] + 120, steps=4)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert chart.locator(".role-axis-label").first.inner_html() != before
