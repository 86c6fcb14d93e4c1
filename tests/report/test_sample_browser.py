"""The browser of samples: its data, and what it does in a real browser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf.report import sample_browser
from rlhf.report.html_page import render
from rlhf.report.page import Page
from rlhf.report.sample_browser import sample_data

HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'><!-- & \"'"


def judged(policy: str, count: int = 25, size: str = "small", seed: int = 1, texts: str = "") -> pd.DataFrame:
    """Judged rows of a policy with made-up scores, a quarter of which the judge contradicts or did not judge."""
    random = np.random.default_rng(sum(map(ord, policy + size)) + seed)
    score, gold = random.normal(0, 1, (2, count)).round(3)
    return pd.DataFrame({
        "size": size, "parameters": 1, "seed": seed, "policy": policy,
        "query": [f"question {n}:{texts}\nTL;DR:" for n in range(count)],
        "a": [f" {policy} says\nword{random.integers(9)} on {n}." for n in range(count)],
        "b": [f" the reference on {n}." for n in range(count)],
        "outcome": random.choice([1.0, 0.75, 0.5, 0.25, 0.0, np.nan], count), "a_score": score,
        "b_score": np.linspace(-0.5, 0.5, count).round(3), "a_gold": gold, "b_gold": 0.1,
        "a_tokens": random.integers(10, 60, count).astype(float), "b_tokens": 20.0,
        "a_has_eos": (random.random(count) < 0.8).astype(float),
    })  # fmt: skip


def both(**settings: Any) -> pd.DataFrame:
    return pd.concat([judged("SFT", **settings), judged("PPO", **settings)], ignore_index=True)


def sample_id(query: str) -> str:
    return hashlib.sha256(query.encode()).hexdigest()[:12]


def test_a_text_is_in_the_page_once_and_what_is_unknown_is_null() -> None:
    data = sample_data(both())
    assert data is not None
    assert len(data["texts"]) == len(set(data["texts"])) == 25 * 2 + len(set(both()["a"]))
    json.dumps(data, allow_nan=False)
    for table, policy in zip(data["tables"], ("SFT", "PPO"), strict=True):
        rows = judged(policy)
        assert table["policy"] == policy
        assert [data["texts"][code] for code in table["a"]] == list(rows["a"])
        assert [data["texts"][code] for code in table["b"]] == list(rows["b"])
        assert table["outcome"] == [None if pd.isna(outcome) else outcome for outcome in rows["outcome"]]
        assert table["a_score"] == list(rows["a_score"])
    assert data["ids"] == [sample_id(query) for query in judged("SFT")["query"]]
    assert (data["total"], data["unit"], data["prefix"]) == (25, "tokens", 0)
    assert sample_data(pd.DataFrame()) is None


def test_the_distance_is_between_the_ranks_of_reward_model_and_judge() -> None:
    rows = judged("PPO", 4).assign(a_score=[3.0, 1.0, 2.0, 9.0], b_score=[0.0, 0.0, 0.0, 8.5], a_tokens=np.nan)
    rows = rows.assign(a_gold=[1.0, 2.0, 3.0, 4.0], b_gold=0.0, outcome=[0.0, 1.0, 0.5, 0.0])
    data = sample_data(rows)
    assert data is not None
    # Margins 3, 1, 2, 0.5 have ranks 4, 2, 3, 1 of 4; gold margins have ranks 1, 2, 3, 4.
    assert data["tables"][0]["distance"] == [0.75, 0.0, 0.0, -0.75]
    assert data["tables"][0]["disagree"] == [1, 0, 0, 1]  # a tie contradicts nobody
    assert data["unit"] == "characters"
    without = sample_data(rows.assign(a_gold=np.nan, b_gold=np.nan))
    assert without is not None
    # Outcomes 0, 1, 0.5, 0 have ranks 1.5, 4, 3, 1.5.
    assert without["tables"][0]["distance"] == [0.625, -0.5, 0.0, -0.125]
    assert "a_gold" not in without["tables"][0]


def test_what_all_queries_begin_with_is_known_and_a_query_may_lack_a_policy() -> None:
    rows = pd.concat([judged("SFT").iloc[1:], judged("PPO")], ignore_index=True)
    data = sample_data(rows.assign(query="<system>Be brief.\n<user>\n" + rows["query"]))
    assert data is not None
    assert data["prefix"] == len("<system>Be brief.\n<user>\n")
    assert [table["policy"] for table in data["tables"]] == ["SFT", "PPO"]
    assert [len(table["query"]) for table in data["tables"]] == [24, 25]


def test_queries_that_would_make_the_page_too_large_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_file: Callable[..., Any]
) -> None:
    rows = both(texts="<" * 100)
    monkeypatch.setattr(sample_browser, "LIMIT", 12_000)
    data = sample_data(rows)
    assert data is not None
    shown = len(data["queries"])
    assert 5 < shown < 25
    assert all(len(table["query"]) == shown for table in data["tables"])
    written = json.dumps(data).replace("<", "\\u003c")
    assert 9_000 < len(written) < 12_500  # each "<" takes six bytes
    page = open_file(write(tmp_path, rows))
    assert f"The first {shown} of 25 queries are here" in page.inner_text("#samples")
    monkeypatch.setattr(sample_browser, "LIMIT", 1)
    assert len((sample_data(rows) or {})["queries"]) == 1


def write(folder: Path, rows: pd.DataFrame) -> Path:
    """Writes the page of nothing but samples."""
    file = folder / "report.html"
    file.write_text(render(Page(folder, {}), [], sample_data(rows)))
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("samples"), both())


@pytest.fixture
def opened(open_file: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """Opens the page of SFT and PPO."""
    return partial(open_file, file)


def field(page: Any, name: str) -> Any:
    return page.locator(f"#samples [name={name}]")


def is_open(page: Any) -> int:
    """Reads the number of the query that is open."""
    return number(page.locator("#samples .query").inner_text())


def number(query: str) -> int:
    return int(query.split()[1].rstrip(":"))


def listed(page: Any) -> list[int]:
    """Reads the numbers of all queries that were found, in their order, by paging through them."""
    total = int(page.locator("#samples .count").inner_text().split()[0])
    found: list[int] = []
    while page.locator("#samples ol button").count():
        found += map(number, page.locator("#samples .start").all_inner_texts())
        if len(found) >= total:
            break
        page.get_by_label("Ten on").click()
    assert len(found) == total
    return found


def numbers(rows: pd.DataFrame) -> list[int]:
    return [number(query) for query in rows["query"]]


def test_filters_give_the_right_rows(opened: Callable[..., Any]) -> None:
    page, rows, sft = opened(), judged("PPO"), judged("SFT")
    assert listed(page) == list(range(25))
    field(page, "text").fill("WORD3 ON")
    has_word = rows["a"].str.contains("word3 on") | sft["a"].str.contains("word3 on")
    assert 0 < has_word.sum() < 25
    assert listed(page) == numbers(rows[has_word])
    field(page, "text").fill("question 7:")
    assert listed(page) == [7]
    page.get_by_role("button", name="Clear").click()
    chosen = {
        "wins": rows["outcome"] > 0.5, "ties": rows["outcome"] == 0.5, "loses": rows["outcome"] < 0.5,
        "not judged": rows["outcome"].isna(),
    }  # fmt: skip
    for word, wanted in chosen.items():
        assert wanted.any()
        page.get_by_label("Outcome of PPO").select_option(word)
        assert listed(page) == numbers(rows[wanted]), word
    page.get_by_label("Outcome of PPO").select_option("wins")
    page.get_by_label("Outcome of SFT").select_option("loses")
    assert listed(page) == numbers(rows[chosen["wins"] & (sft["outcome"] < 0.5)])
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Reward model and judge disagree on PPO").check()
    margin, judge = rows["a_score"] - rows["b_score"], rows["outcome"] - 0.5
    disagree = numbers(rows[margin * judge < 0])
    assert 0 < len(disagree) < 25
    assert listed(page) == disagree
    page.get_by_role("button", name="Clear").click()
    field(page, "length_low").fill("20")
    field(page, "length_high").fill("40")
    assert listed(page) == numbers(rows[rows["a_tokens"].between(20, 40)])
    field(page, "reward_low").fill("0.1")
    within = rows["a_tokens"].between(20, 40) & (rows["a_score"] >= 0.1)
    assert listed(page) == numbers(rows[within])
    field(page, "text").fill("nothing has this")
    assert listed(page) == []
    assert not page.locator("#samples article").is_visible()


def test_filters_look_at_the_policy_that_is_compared(opened: Callable[..., Any]) -> None:
    page, rows = opened(), judged("SFT")
    page.get_by_label("with").select_option("SFT")
    field(page, "reward_high").fill("0")
    assert listed(page) == numbers(rows[rows["a_score"] <= 0])
    assert "Reward of SFT" in page.inner_text("#samples form")


def test_sorts_give_the_right_order(opened: Callable[..., Any]) -> None:
    page, rows, sft = opened(), judged("PPO"), judged("SFT")
    gain = rows["a_score"] - sft["a_score"]
    margin, gold = rows["a_score"] - rows["b_score"], rows["a_gold"] - rows["b_gold"]
    distance = margin.rank() - gold.rank()  # all are judged by gold
    for option, key in (
        ("gain in reward", gain), ("loss in reward", -gain), ("reward model above judge", distance),
        ("judge above reward model", -distance),
    ):  # fmt: skip
        page.get_by_label("Sort by").select_option(option)
        assert listed(page) == list(key.sort_values(ascending=False, kind="stable").index), option
        page.get_by_role("button", name="Clear").click()
    page.get_by_label("Compare").select_option("reference")
    page.get_by_label("Sort by").select_option("gain in reward")
    assert listed(page) == list(margin.sort_values(ascending=False).index)


def test_numbers_of_a_sample_are_those_of_the_table(opened: Callable[..., Any]) -> None:
    page = opened()
    cards = [card.inner_text() for card in page.locator("#samples .response").all()]
    for policy, card in zip(("reference", "SFT", "PPO"), cards, strict=True):
        row, side = judged("SFT" if policy == "reference" else policy).iloc[0], "b" if policy == "reference" else "a"
        assert card.startswith(policy)
        assert f"reward {row[f'{side}_score']:.2f} · gold {row[f'{side}_gold']:.2f}" in card
        assert f"tokens {row[f'{side}_tokens']:.0f}" in card
        assert ("cut off" in card) == (side == "a" and row["a_has_eos"] == 0)


def test_what_differs_between_two_texts_is_marked_and_both_stay_as_they_are(
    tmp_path: Path, open_file: Callable[..., Any]
) -> None:
    before, after = "My cat  sat.\n\nThe old dog ran.", "My big cat sat.\nThe dog ran away."
    rows = pd.concat([judged("SFT", 1).assign(a=before), judged("PPO", 1).assign(a=after, b="My cat.")])
    page = open_file(write(tmp_path, rows))
    written = page.locator("#samples .written")
    marked = [[page.locator("#samples .response").nth(place).locator(tag).all_inner_texts() for tag in ("del", "ins")]
              for place in range(written.count())]  # fmt: skip
    stripped = [[[text.strip() for text in texts] for texts in pair] for pair in marked]
    assert stripped == [[[], []], [[], []], [["old"], []], [[], ["big", "away"]]]  # two references, SFT, PPO
    assert written.all_text_contents() == ["the reference on 0.", "My cat.", before, after]
    assert page.inner_text("#samples .legend") == "Struck through: only in SFT. Underlined: only in PPO."
    page.get_by_label("Compare").select_option("reference")
    assert page.locator("#samples del").count() == 0
    assert page.locator("#samples ins").all_inner_texts()[0].strip() == "big"
    assert "only in reference of PPO" in page.inner_text("#samples .legend")


def test_an_empty_response_is_called_so(tmp_path: Path, open_file: Callable[..., Any]) -> None:
    page = open_file(write(tmp_path, judged("PPO", 1).assign(a="", b_name="SFT")))
    empty = page.locator("#samples .written").last
    assert empty.evaluate("each => getComputedStyle(each, '::after').content") == '"(empty)"'
    assert page.locator("#samples .response h3").first.inner_text() == "SFT"
    assert page.get_by_label("Compare").locator("option").all_inner_texts() == ["SFT", "PPO"]


def test_text_that_looks_like_html_is_shown_as_text(tmp_path: Path, open_file: Callable[..., Any]) -> None:
    rows = both(count=3).assign(query=lambda rows: rows["query"] + HOSTILE, b=HOSTILE)
    rows = rows.assign(a=rows["a"] + HOSTILE, policy=rows["policy"] + HOSTILE)
    page = open_file(write(tmp_path, rows))
    page.get_by_label("Compare").select_option(index=1)
    for place in (".query", ".responses", ".legend", "ol", "form"):
        assert HOSTILE in page.inner_text(f"#samples {place}"), place
    assert page.locator("#samples .written").last.text_content() == rows["a"].iloc[3].strip()
    assert page.locator("#samples img").count() == 0


def test_keys_go_to_the_next_and_the_previous_sample_but_not_while_typing(opened: Callable[..., Any]) -> None:
    page = opened()
    page.locator("#samples ol button").first.focus()
    for key, place in (
        ("j", 1),
        ("ArrowDown", 2),
        ("ArrowRight", 3),
        ("k", 2),
        ("ArrowUp", 1),
        ("ArrowLeft", 0),
        ("k", 0),
    ):
        page.keyboard.press(key)
        assert is_open(page) == place, key
        assert page.evaluate("document.activeElement.ariaCurrent") == "true"
    for _ in range(12):
        page.keyboard.press("j")
    assert is_open(page) == 12
    assert page.locator("#samples .start").first.inner_text().startswith("question 10:")
    page.locator("#samples .written").first.click()
    page.keyboard.press("j")
    assert is_open(page) == 13
    page.get_by_role("button", name="Previous").click()
    assert is_open(page) == 12
    field(page, "text").focus()
    page.keyboard.type("jk")
    assert page.locator("#samples .count").inner_text() == "0 of 25 samples"
    field(page, "text").fill("")
    page.locator("h1").click()
    page.keyboard.press("j")  # nothing has the focus, and the sample can be seen
    assert is_open(page) == 1
    page.get_by_role("link", name="How it was made").focus()
    page.keyboard.press("j")
    assert is_open(page) == 1


def test_a_link_opens_its_sample(opened: Callable[..., Any]) -> None:
    name = sample_id(judged("PPO")["query"][17])
    page = opened(place=f"#sample={name}")
    assert is_open(page) == 17
    assert page.locator("#samples article").evaluate("each => each.getBoundingClientRect().top") < 450
    page.get_by_role("button", name="Next").click()
    assert page.url.endswith(f"#sample={sample_id(judged('PPO')['query'][18])}")
    field(page, "text").fill("question 3:")
    page.evaluate(f"location.hash = 'sample={name}'")
    page.wait_for_function("document.querySelector('#samples .count').textContent.startsWith('25')")
    assert is_open(page) == 17
    assert page.locator("#samples .link").get_attribute("href") == f"#sample={name}"
    assert is_open(opened(place="#sample=unknown")) == 0


def test_a_filter_opens_the_first_sample_and_another_comparison_keeps_it(opened: Callable[..., Any]) -> None:
    page = opened()
    page.locator("#samples ol button").nth(5).click()
    page.get_by_label("Compare").select_option("reference")
    assert is_open(page) == 5
    assert page.locator("#samples [aria-current] .start").inner_text().startswith("question 5:")
    field(page, "text").fill("question")
    assert is_open(page) == 0


def test_of_several_runs_one_is_chosen_or_all_are_side_by_side(tmp_path: Path, open_file: Callable[..., Any]) -> None:
    other = both(size="large").assign(b_score=9.0)
    rows = pd.concat([both(), other[other["query"] != "question 4:\nTL;DR:"], judged("PPO", size="huge")])
    page = open_file(write(tmp_path, rows))
    names = page.locator("#samples .response h3")
    assert [name.split()[0] for name in names.all_inner_texts()] == ["reference", "SFT", "PPO"]
    page.get_by_label("Run").select_option("large")
    assert 4 not in listed(page)
    card = page.locator("#samples .response").last.inner_text()
    assert f"reward {judged('PPO', size='large')['a_score'].iloc[is_open(page)]:.2f}" in card
    page.get_by_label("Run").select_option("all")
    assert names.count() == 1 + 5
    assert "reward" not in page.locator("#samples .response").first.inner_text()  # reward models differ
    page.get_by_label("Compare").select_option("PPO (small)")
    page.get_by_label("with").select_option("PPO (large)")
    assert (
        page.inner_text("#samples .legend") == "Struck through: only in PPO (small). Underlined: only in PPO (large)."
    )
    facts = page.locator("#samples ol .facts").first
    assert "reward" not in facts.inner_text()  # a gain would be of two reward models
    page.get_by_label("Compare").select_option("SFT (large)")
    assert "reward" in facts.inner_text()
    page.get_by_label("Run").select_option("large")
    page.evaluate(f"location.hash = 'sample={sample_id('question 4:' + chr(10) + 'TL;DR:')}'")
    page.wait_for_function("document.querySelector('#samples .query').textContent.includes('question 4:')")
    assert field(page, "run").input_value() == "small"  # the first run that has it


def test_a_table_without_scores_has_no_filters_that_need_them(tmp_path: Path, open_file: Callable[..., Any]) -> None:
    rows = judged("mine").drop(columns="a_has_eos")
    names = [name for name in rows if name[:2] in ("a_", "b_")]
    page = open_file(write(tmp_path, rows.assign(**dict.fromkeys([*names, "a_has_eos"], np.nan))))
    for place in (".reward", ".disagree"):
        assert not page.locator(f"#samples {place}").is_visible()
    options = page.locator("#samples [name=sort] option:not([hidden])").all_inner_texts()
    assert options == ["order of the table"]
    assert "Length of mine (characters)" in page.inner_text("#samples form")
    field(page, "length_low").fill("18")
    assert listed(page) == numbers(rows[rows["a"].str.len() >= 18])
    assert page.locator("#samples .response").first.inner_text().splitlines()[0] == "reference"


def test_six_thousand_queries_stay_a_small_page(tmp_path: Path, open_file: Callable[..., Any]) -> None:
    rows = both(count=6000, texts=" the same long text as in many posts" * 55)
    file = write(tmp_path, rows)
    assert 12_000_000 < file.stat().st_size < 20_000_000
    page = open_file(file)
    assert page.locator("#samples .count").inner_text() == "6000 of 6000 samples"
    field(page, "text").fill("question 5999:")
    assert listed(page) == [5999]
    field(page, "text").fill("")
    page.get_by_label("Sort by").select_option("loss in reward")
    gain = judged("PPO", 6000)["a_score"] - judged("SFT", 6000)["a_score"]
    assert is_open(page) == gain.idxmin()
    wins = judged("PPO", 6000)["outcome"] > 0.5
    page.get_by_label("Outcome of PPO").select_option("wins")
    assert page.locator("#samples .count").inner_text() == f"{wins.sum()} of 6000 samples"
    assert is_open(page) == gain[wins].idxmin()
    assert page.locator("#samples *").count() < 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_it_fits_and_prints_the_open_sample_only(opened: Callable[..., Any], width: int, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tops = {card.bounding_box()["y"] for card in page.locator("#samples .response").all()}
    assert len(tops) == (1 if width > 1000 else 3)
    page.emulate_media(media="print")
    for place, visible in (("form", False), ("ol", False), (".steps", False), (".query", True), (".responses", True)):
        assert page.locator(f"#samples {place}").is_visible() == visible, place
