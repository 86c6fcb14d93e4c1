"""Query, response and their tokens (D01, D02, D04, D06, D07)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

from rlhf.data.formats import comparison, demonstration
from rlhf.data.texts import (
    BadRecordError,
    TextFormat,
    UnfittableError,
    border,
    join_response,
    one_leading_space,
    plain_query,
    tldr_query,
)
from rlhf.models.tokenizers import encode

EOS = "<|endoftext|>"
LIMITED = ["query", "response", "article", "article_response"]
RECORD = {"subreddit": "tifu", "title": "A title", "post": "A post.", "summary": "A summary."}


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def query_of(post: str) -> str:
    return f"SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: {post}\n\nTL;DR:"


def fitted(tokenizer: Any, post: str, max_length: int) -> str:
    text, ids = tldr_query(RECORD | {"post": post}, tokenizer, TextFormat(max_query_length=max_length))
    assert ids == tokenizer(text)["input_ids"]
    assert len(ids) <= max_length
    return text


def test_the_query_is_exactly_the_papers(tokenizer: Any) -> None:
    text, ids = tldr_query(RECORD, tokenizer, TextFormat())
    assert text == "SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: A post.\n\nTL;DR:"
    assert tokenizer.decode(ids) == text


def test_the_format_of_the_query_is_a_setting(tokenizer: Any) -> None:
    assert tldr_query(RECORD, tokenizer, TextFormat(query="{title}|{post}|"))[0] == "A title|A post.|"
    with pytest.raises(BadRecordError, match="'author'"):
        tldr_query(RECORD, tokenizer, TextFormat(query="{author}: {post}"))


@pytest.mark.parametrize(
    ("name", "value"), [("query", "POST: {post"), ("article", "}"), *((f"max_{n}_length", 0) for n in LIMITED)]
)
def test_formats_and_lengths_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        TextFormat(**{name: value})
    assert (refused.value.title, refused.value.errors()[0]["loc"]) == ("data.text", (name,))


def test_braces_in_a_post_are_text(tokenizer: Any) -> None:
    assert fitted(tokenizer, "{title} {}", 512) == query_of("{title} {}")


LINES = "The first line.\nThe second line, longer.\n\nThe third line, which is the longest of all of them."


@pytest.mark.parametrize(
    ("post", "kept"),
    [
        (LINES, LINES),
        (LINES, "The first line.\nThe second line, longer.\n"),
        (LINES, "The first line.\nThe second line, longer."),
        (LINES, "The first line."),
        (LINES, "The first li"),
        ("No newline at all in this post", "No newline at all in this po"),
        ("\nOnly one, in front", ""),
        ("\nOnly one, in front", "\nOnly one"),
    ],
)
def test_a_long_post_is_cut_at_its_last_newline_and_else_by_one_character(tokenizer: Any, post: str, kept: str) -> None:
    steps = [post]
    while steps[-1]:
        head, newline, _ = steps[-1].rpartition("\n")
        steps.append(head if newline else steps[-1][:-1])
    budget = count(tokenizer, query_of(kept))
    expected = next(step for step in steps if count(tokenizer, query_of(step)) <= budget)
    assert len(expected) <= len(kept) + 2
    assert fitted(tokenizer, post, budget) == query_of(expected)


def test_one_token_too_many_costs_the_whole_last_line(tokenizer: Any) -> None:
    post = "Short.\nA second line that is a good deal longer than the first one."
    assert fitted(tokenizer, post, count(tokenizer, query_of(post))) == query_of(post)
    assert fitted(tokenizer, post, count(tokenizer, query_of(post)) - 1) == query_of("Short.")


def test_one_character_too_many_costs_one_character(tokenizer: Any) -> None:
    post = "ÄÖÜ" * 20
    assert fitted(tokenizer, post, count(tokenizer, query_of(post)) - 1) == query_of(post[:-1])


@pytest.mark.parametrize("tokens", range(1, 33))
def test_characters_of_several_tokens_are_not_cut_too_far(tokenizer: Any, tokens: int) -> None:
    post = "🎉" * 20
    assert count(tokenizer, post) == 80
    kept = post[: len(post) - math.ceil(tokens / 4)]
    assert fitted(tokenizer, post, count(tokenizer, query_of(post)) - tokens) == query_of(kept)


def test_the_default_maximum_is_512_tokens(tokenizer: Any) -> None:
    post = "~" * (520 - count(tokenizer, query_of("")))
    text, ids = tldr_query(RECORD | {"post": post}, tokenizer, TextFormat())
    assert len(ids) == 512
    assert text.startswith("SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: ~~")
    assert text.endswith("~\n\nTL;DR:")


def test_what_no_cut_can_make_fit_is_unfittable(tokenizer: Any) -> None:
    with pytest.raises(UnfittableError, match="more than 10"):
        tldr_query(RECORD, tokenizer, TextFormat(max_query_length=10))
    with pytest.raises(UnfittableError, match="more than 3"):
        plain_query("a prompt is never cut", tokenizer, TextFormat(max_query_length=3))


def test_articles_have_a_format_and_a_maximum_of_their_own(tokenizer: Any) -> None:
    info = {"article": "One.\nTwo, the longer line.", "post": None, "title": "Not shown", "subreddit": None}
    assert tldr_query(info, tokenizer, TextFormat(max_query_length=1))[0] == f"Article:\n{info['article']}\n\nTL;DR:\n"
    short = "Article:\nOne.\n\nTL;DR:\n"
    assert tldr_query(info, tokenizer, TextFormat(max_article_length=count(tokenizer, short)))[0] == short
    assert (TextFormat().max_article_length, TextFormat().max_article_response_length) == (1919, 155)


@pytest.mark.parametrize("text", ["x y", " x y", "  x y", "x y \n", "\n x y"])
def test_a_response_has_exactly_one_leading_space(text: str) -> None:
    assert one_leading_space(text) == " x y"


def test_demonstrations_and_comparisons_give_the_same_response(
    tokenizer: Any, demos: list[dict[str, Any]], pairs: list[dict[str, Any]]
) -> None:
    text = TextFormat()
    assert not demos[0]["summary"].startswith(" ")
    assert all(s["text"].startswith(" ") for pair in pairs for s in pair["summaries"])
    pairs[0]["summaries"][0]["text"] = " " + demos[0]["summary"]
    demo = demonstration(demos[0], tokenizer, text, "tldr", need_response=True)
    pair = comparison(pairs[0], tokenizer, text, "openai")
    assert demo["reference"] == pair["chosen_text"] == " " + demos[0]["summary"]
    assert demo["input_ids"] == pair["chosen_ids"]
    assert tokenizer.decode(demo["input_ids"]) == demo["query"] + " " + demos[0]["summary"] + EOS
    assert tokenizer.decode(demo["input_ids"][demo["response_start"] :]) == " " + demos[0]["summary"] + EOS


def test_a_plain_completion_stays_as_it_is(tokenizer: Any) -> None:
    row = demonstration({"prompt": "A:", "completion": "b "}, tokenizer, TextFormat(), "plain", need_response=True)
    assert tokenizer.decode(row["input_ids"]) == "A:b " + EOS


def test_query_and_response_are_tokenised_as_one_text(tokenizer: Any) -> None:
    query, response = "This is my sis", "ter and my friend"
    query_ids = encode(tokenizer, query)
    joint = join_response(tokenizer, query, query_ids, response, 53)
    start = joint["response_start"]
    assert joint["input_ids"] == [*tokenizer(query + response)["input_ids"], tokenizer.eos_token_id]
    assert joint["input_ids"][:start] == query_ids[:start]
    assert joint["input_ids"][start] != query_ids[start]
    assert 0 < start < len(query_ids)


@pytest.mark.parametrize(
    ("ids", "query_ids", "start"),
    [
        ([1, 2, 3, 4], [1, 2], 2),
        ([1, 9, 4], [1, 2], 1),  # one token reaches into the response
        ([1, 9, 4, 5], [1, 2, 3], 1),  # it has taken in two tokens of the query
        ([9, 4], [1, 2, 3], 0),
        ([1, 2], [1, 2, 3], 2),  # the query alone has more tokens
    ],
)
def test_what_is_not_of_the_query_alone_belongs_to_the_response(
    ids: list[int], query_ids: list[int], start: int
) -> None:
    assert border(ids, query_ids) == start


@pytest.mark.parametrize(("spare", "truncated"), [(1, False), (0, False), (-1, True), (-3, True)])
def test_a_response_beyond_its_maximum_loses_its_end_and_eos(tokenizer: Any, spare: int, truncated: bool) -> None:
    query, response = "POST: a\n\nTL;DR:", " one response of some words"
    length = count(tokenizer, response) + 1
    joint = join_response(tokenizer, query, encode(tokenizer, query), response, length + spare)
    ids = joint["input_ids"][joint["response_start"] :]
    assert joint["truncated"] is truncated
    assert len(ids) == min(length, length + spare)
    assert (ids[-1] == tokenizer.eos_token_id) is not truncated
    assert (" one response of some words" + EOS).startswith(tokenizer.decode(ids))


@pytest.mark.parametrize("long", [0, 1, 2])
def test_a_pair_is_truncated_if_one_of_its_sides_is(tokenizer: Any, long: int) -> None:
    sides = [" one", " two", " three"]
    sides[long] += " and a good many words that are too much"
    pair = {"prompt": "A:", "chosen": sides[0], "rejected": sides[1]}
    assert comparison(pair, tokenizer, TextFormat(max_response_length=8), "pair")["truncated"] is (long < 2)


def test_summaries_of_articles_may_be_longer(tokenizer: Any, pairs: list[dict[str, Any]]) -> None:
    text = TextFormat(max_response_length=2, max_article_response_length=90)
    truncated = [comparison(pair, tokenizer, text, "openai")["truncated"] for pair in pairs]
    assert truncated == [True, True, True, False, False]


@pytest.mark.parametrize(("template", "bos"), [(f"$A {EOS}", 0), (f"{EOS} $A", 1), (f"{EOS} $A {EOS}", 1)])
def test_a_tokenizer_that_adds_eos_or_bos_gives_one_eos_at_the_end(tokenizer: Any, template: str, bos: int) -> None:
    plain = demonstration(RECORD, tokenizer, TextFormat(), "tldr", need_response=True)
    adding = copy.deepcopy(tokenizer)
    special = [(EOS, tokenizer.eos_token_id)]
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    row = demonstration(RECORD, adding, TextFormat(), "tldr", need_response=True)
    front = [tokenizer.eos_token_id] * bos
    assert row["query_ids"] == front + plain["query_ids"]
    assert row["input_ids"] == front + plain["input_ids"]
    assert row["response_start"] == plain["response_start"] + bos
