"""Whole datasets: the two public schemas, bad records and their report, the cache (D04, D06)."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning_utilities.core import rank_zero

from rlhf.data import tokenising
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_comparisons, load_demonstrations
from rlhf.errors import UserError

EOS = "<|endoftext|>"
Writer = Callable[[str, Any], str]
Records = list[dict[str, Any]]


def demonstrations_of(path: str, tokenizer: Any, need_response: bool = True, **text: Any) -> Any:
    return load_demonstrations(Source(path), "data.train", tokenizer, TextFormat(**text), need_response)


def comparisons_of(path: str, tokenizer: Any, **text: Any) -> Any:
    return load_comparisons(Source(path), "data.train", tokenizer, TextFormat(**text))


def test_demonstrations_in_the_public_schema(tokenizer: Any, demonstrations_file: str, demos: Records) -> None:
    rows = demonstrations_of(demonstrations_file, tokenizer, max_response_length=99)
    assert len(rows) == len(demos)
    for row, demo in zip(rows, demos, strict=True):
        query = f"SUBREDDIT: r/{demo['subreddit']}\n\nTITLE: {demo['title']}\n\nPOST: {demo['post']}\n\nTL;DR:"
        assert row["query"] == tokenizer.decode(row["query_ids"]) == query
        assert row["reference"] == " " + demo["summary"]
        assert tokenizer.decode(row["input_ids"]) == query + " " + demo["summary"] + EOS
        assert row["input_ids"][: row["response_start"]] == row["query_ids"]
        assert not row["truncated"]
        assert json.loads(row["record"]) == demo


def test_comparisons_in_the_public_schema(tokenizer: Any, comparisons_file: str, pairs: Records) -> None:
    rows = comparisons_of(comparisons_file, tokenizer, max_response_length=99)
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        chosen, rejected = (pair["summaries"][i] for i in (pair["choice"], 1 - pair["choice"]))
        assert (row["chosen_text"], row["rejected_text"]) == (chosen["text"], rejected["text"])
        assert (row["chosen_policy"], row["rejected_policy"]) == (chosen["policy"], rejected["policy"])
        assert (row["batch"], row["confidence"]) == (pair["batch"], pair["extra"]["confidence"])
        assert tokenizer.decode(row["chosen_ids"]) == row["query"] + chosen["text"] + EOS
        assert tokenizer.decode(row["rejected_ids"]) == row["query"] + rejected["text"] + EOS
    assert [row["query"].startswith("Article:\n") for row in rows] == [False] * 3 + [True] * 2


def test_generic_comparisons(tokenizer: Any, write_jsonl: Writer) -> None:
    path = write_jsonl("a.jsonl", [{"prompt": "Q:", "chosen": " yes", "rejected": " no"}])
    row = comparisons_of(path, tokenizer)[0]
    assert [tokenizer.decode(row[c]) for c in ("chosen_ids", "rejected_ids")] == ["Q: yes" + EOS, "Q: no" + EOS]
    assert (row["batch"], row["confidence"], row["chosen_policy"]) == ("", None, "")


def test_prompts_need_no_response(tokenizer: Any, write_jsonl: Writer) -> None:
    path = write_jsonl("a.jsonl", [{"prompt": "Say A"}, {"prompt": "Say B"}])
    assert demonstrations_of(path, tokenizer, need_response=False)["query"][:] == ["Say A", "Say B"]
    with pytest.raises(UserError, match=r"subreddit \+ title \+ post \+ summary, or prompt \+ completion"):
        demonstrations_of(path, tokenizer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"post": ""}, "empty post"),
        ({"post": None}, "empty post"),
        ({"summary": " \n"}, "empty summary"),
        ({"summary": None}, "empty summary"),
    ],
)
def test_a_bad_demonstration_is_left_out_and_reported(
    tokenizer: Any, write_jsonl: Writer, demos: Records, change: dict[str, Any], reason: str
) -> None:
    demos[1] |= change
    path = write_jsonl("bad.jsonl", demos)
    report = rf"data\.train: .*bad\.jsonl \(train\): left out 1 of 5 .*{reason}: 1, first in record 2 \(id t3_a2\)"
    with pytest.warns(UserWarning, match=report):
        rows = demonstrations_of(path, tokenizer)
    assert [json.loads(record)["id"] for record in rows["record"]] == ["t3_a1", "t3_a3", "t3_a4", "t3_a5"]


BAD_PAIRS = [
    ({"choice": 2}, "choice is out of range"),
    ({"choice": -1}, "choice is out of range"),
    ({"choice": None}, "choice is out of range"),
    ({"summaries": []}, "not 2 summaries"),
    ({"summaries": [{"text": " a", "policy": "x", "note": None}]}, "not 2 summaries"),
    ({"summaries": [{"text": f" {i}", "policy": "x", "note": None} for i in "abc"]}, "not 2 summaries"),
    ({"summaries": [{"text": t, "policy": "x", "note": None} for t in (" a", "a ")]}, "chosen and rejected are equal"),
    ({"summaries": [{"text": t, "policy": "x", "note": None} for t in (" a", " ")]}, "empty text"),
    ({"info": {"id": "t3_a2", "post": None, "article": None}}, "empty post"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_PAIRS)
def test_a_bad_comparison_is_left_out_and_reported(
    tokenizer: Any, write_jsonl: Writer, pairs: Records, change: dict[str, Any], reason: str
) -> None:
    pairs[1] |= change
    path = write_jsonl("bad.jsonl", pairs)
    with pytest.warns(UserWarning, match=rf"left out 1 of 5 .*{reason}: 1, first in record 2 \(id t3_a2\)"):
        rows = comparisons_of(path, tokenizer)
    assert [json.loads(record)["info"]["id"] for record in rows["record"]] == ["t3_a1", "t3_a3", "c1", "c2"]


def test_a_choice_read_as_a_float_is_a_choice(tokenizer: Any, write_jsonl: Writer, pairs: Records) -> None:
    path = write_jsonl("float.jsonl", [pair | {"choice": float(pair["choice"])} for pair in pairs])
    assert comparisons_of(path, tokenizer)["chosen_policy"][:2] == ["sup1", "sup4_ppo_rm3_kl10"]


def test_bad_records_are_counted_by_reason(tokenizer: Any, write_jsonl: Writer, demos: Records) -> None:
    demos[0]["post"] = demos[2]["post"] = demos[3]["summary"] = ""
    report = r"left out 3 of 5 .*empty post: 2, first in record 1 .*empty summary: 1, first in record 4 "
    with pytest.warns(UserWarning, match=report):
        assert len(demonstrations_of(write_jsonl("bad.jsonl", demos), tokenizer)) == 2


def test_only_bad_records_are_an_error(tokenizer: Any, write_jsonl: Writer, demos: Records, pairs: Records) -> None:
    path = write_jsonl("bad.jsonl", [demo | {"post": " "} for demo in demos])
    with pytest.raises(UserError, match=r"bad\.jsonl.*none of the 5 records can be used \(empty post: 5"):
        demonstrations_of(path, tokenizer)
    path = write_jsonl("bad_pairs.jsonl", [pair | {"choice": 7} for pair in pairs])
    with pytest.raises(UserError, match="none of the 5 records can be used"):
        comparisons_of(path, tokenizer)


def test_a_long_run_of_bad_records_comes_before_a_good_one(tokenizer: Any, write_jsonl: Writer, demos: Records) -> None:
    path = write_jsonl("late.jsonl", [demos[0] | {"post": ""}] * 1001 + demos[:1])
    with pytest.warns(UserWarning, match="left out 1001 of 1002"):
        assert len(demonstrations_of(path, tokenizer)) == 1


def test_a_long_run_without_confidence_comes_before_one_with_it(
    tokenizer: Any, write_jsonl: Writer, pairs: Records
) -> None:
    none = pairs[0] | {"extra": {"confidence": None}}
    rows = comparisons_of(write_jsonl("late.jsonl", [none] * 1001 + pairs[:1]), tokenizer)
    assert rows["confidence"][-2:] == [None, 7]


def test_an_unfittable_query_is_an_error_that_names_the_record(
    tokenizer: Any, write_jsonl: Writer, demos: Records
) -> None:
    demos[2]["title"] = "long " * 400
    path = write_jsonl("a.jsonl", demos)
    with pytest.raises(
        UserError, match=r"data\.train: record 3 \(id t3_a3\), counting from 1: .*more than 300.*drop_unfittable"
    ):
        demonstrations_of(path, tokenizer, max_query_length=300)
    with pytest.warns(UserWarning, match=r"left out 1 of 5 .*more than 300: 1, first in record 3 \(id t3_a3\)"):
        rows = demonstrations_of(path, tokenizer, max_query_length=300, drop_unfittable=True)
    assert [json.loads(record)["id"] for record in rows["record"]] == ["t3_a1", "t3_a2", "t3_a4", "t3_a5"]


@pytest.mark.parametrize(("length", "report"), [(99, None), (5, "5 of 5 responses (100.0%)")])
def test_truncated_responses_are_counted(
    tokenizer: Any, demonstrations_file: str, caplog: pytest.LogCaptureFixture, length: int, report: str | None
) -> None:
    logger: logging.Logger = rank_zero.log
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)
    try:
        rows = demonstrations_of(demonstrations_file, tokenizer, max_response_length=length)
    finally:
        logger.removeHandler(caplog.handler)
    assert sum(rows["truncated"][:]) == (5 if report else 0)
    messages = {message for message in caplog.messages if "responses" in message}
    assert [report in message for message in messages] == [True] if report else not messages


@pytest.fixture
def processed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all demonstrations that were processed, not taken from the cache."""
    ids: list[str] = []
    original = tokenising.demonstration

    def spy(record: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        ids.append(record["id"])
        return original(record, *args, **kwargs)

    monkeypatch.setattr(tokenising, "demonstration", spy)
    return ids


@pytest.mark.parametrize(
    "use",
    [
        {},
        {"padding": True},
        {"truncation": True, "max_length": 3},
        {"padding": "max_length", "max_length": 9},
    ],
)
def test_a_second_load_takes_the_cache_whatever_the_tokenizer_did_meanwhile(
    tokenizer: Any, write_jsonl: Writer, demos: Records, processed: list[str], use: dict[str, Any]
) -> None:
    path = write_jsonl("cached.jsonl", demos)
    own = copy.deepcopy(tokenizer)
    first = demonstrations_of(path, own)
    own(["a", "a longer text"], **use)
    second = demonstrations_of(path, own)
    assert processed == [demo["id"] for demo in demos]
    assert second.to_list() == first.to_list()


def test_padding_and_truncation_left_in_a_tokenizer_change_no_tokens(
    tokenizer: Any, write_jsonl: Writer, demos: Records
) -> None:
    used = copy.deepcopy(tokenizer)
    used(["a", "a longer text"], padding="max_length", truncation=True, max_length=5)
    rows = demonstrations_of(write_jsonl("used.jsonl", demos), used)
    assert rows.to_list() == demonstrations_of(write_jsonl("new.jsonl", demos), tokenizer).to_list()


def test_other_settings_data_or_tokens_are_processed_anew(
    tokenizer: Any, write_jsonl: Writer, demos: Records, processed: list[str]
) -> None:
    path = write_jsonl("cached.jsonl", demos)
    demonstrations_of(path, tokenizer)
    demonstrations_of(path, tokenizer, max_response_length=7)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["flatmate"])
    assert demonstrations_of(path, other)["query_ids"][0] != demonstrations_of(path, tokenizer)["query_ids"][0]
    assert len(processed) == 3 * len(demos)
    Path(path).write_text(Path(path).read_text().replace("flatmate", "roommate"))
    assert "roommate" in demonstrations_of(path, tokenizer)["query"][0]


def test_answers_that_are_numbers_are_texts_in_csv_and_refused_by_name_in_json(
    tokenizer: Any, write_jsonl: Writer, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n1 + 1 =,2\nIs 3 odd?,True\nWhat?,None\n")
    rows = demonstrations_of(str(tmp_path / "a.csv"), tokenizer)
    assert rows["reference"][:] == ["2", "True", "None"]
    path = write_jsonl("a.jsonl", [{"prompt": "1 + 1 =", "completion": 2}, {"prompt": "3?", "completion": True}])
    with pytest.raises(
        UserError, match=r"completion is a number and no text: 1, first in record 1.*truth value.*record 2"
    ):
        demonstrations_of(path, tokenizer)
