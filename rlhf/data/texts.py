"""From records to token ids: the TL;DR query and its truncation, the response, one joint sequence (D01 to D07)."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.checks import at_least
from rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]


@dataclass(frozen=True)
class TextFormat:
    """How texts are made and how long they may be; the defaults are the paper's.

    Attributes:
        query: format of a TL;DR query; fields are columns of the record (D01).
        article: format of a CNN/DM query.
        max_query_length: tokens of a query; a TL;DR post is cut until it fits, an article likewise (D02).
        max_article_length: the same for articles.
        max_response_length: tokens of a response with its EOS (D06).
        max_article_response_length: the same for summaries of articles.
        drop_unfittable: leave out a query that can't be made to fit, instead of stopping.
    """

    query: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    article: str = "Article:\n{article}\n\nTL;DR:\n"
    max_query_length: int = 512
    max_article_length: int = 1919
    max_response_length: int = 53
    max_article_response_length: int = 155
    drop_unfittable: bool = False

    def __post_init__(self) -> None:
        for name in ("query", "article"):
            try:
                list(string.Formatter().parse(getattr(self, name)))
            except ValueError as error:
                raise UserError(f"data.text.{name} is no format string: {error}.") from error
        for name in ("max_query_length", "max_article_length", "max_response_length", "max_article_response_length"):
            at_least(f"data.text.{name}", getattr(self, name), 1)


class BadRecordError(Exception):
    """A record that can't be used; the message is the reason."""


class UnfittableError(BadRecordError):
    """A query that no allowed cut brings down to its maximum length."""


# ---------------------------------------------------------------------------------------------------------- tokens


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without an EOS that the tokenizer may append."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def fit_query(
    tokenizer: PreTrainedTokenizerBase, template: str, fields: Record, field: str, max_length: int
) -> tuple[str, list[int]]:
    """Fill a template and cut one field until the result fits (D02).

    The field is cut at its last newline; only where there is none, by one character. Everything else survives.

    Returns:
        The text and its token ids.
    """
    fields = {name: "" if value is None else value for name, value in fields.items()}
    while True:
        try:
            text = template.format(**fields)
        except (KeyError, IndexError) as error:
            raise BadRecordError(f"the query format needs the field {error}") from error
        ids = encode(tokenizer, text)
        if len(ids) <= max_length:
            return text, ids
        body = fields[field]
        if not body:
            raise UnfittableError(f"the query has {len(ids)} tokens without any {field}, more than {max_length}")
        cut = body.rfind("\n")
        # One character at a time is slow; as none is worth more than 4 tokens, these go in any case.
        surplus = max(1, (len(ids) - max_length) // 4)
        fields[field] = body[: cut if cut >= 0 else -surplus]


def join_response(
    tokenizer: PreTrainedTokenizerBase, query: str, query_ids: list[int], response: str, max_response_length: int
) -> dict[str, Any]:
    """Query and response tokenised as joint text (D07), EOS at the end (D04).

    Returns:
        `input_ids`, `response_start` (the first position that does not belong to the query) and `truncated`: whether
        the response lost its end, and with it its EOS, to the maximum length (D06).
    """
    ids = encode(tokenizer, query + response)
    start = len(query_ids)
    if ids[:start] != query_ids:  # a token spans the border: it belongs to the response
        start = next(i for i, (a, b) in enumerate(zip(ids, query_ids, strict=False)) if a != b)
    ids = [*ids, tokenizer.eos_token_id]
    limit = start + max_response_length
    return {"input_ids": ids[:limit], "response_start": start, "truncated": len(ids) > limit}


# --------------------------------------------------------------------------------------------------------- records


def one_leading_space(text: str) -> str:
    """The TL;DR demonstrations lack the leading space, the comparisons have it; a response has exactly one (D04)."""
    return " " + text.strip()


def required_text(record: Record, column: str) -> str:
    """A column that must hold text."""
    text = record.get(column)
    if not isinstance(text, str) or not text.strip():
        raise BadRecordError(f"empty {column}")
    return text


def tldr_query(record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> tuple[str, list[int]]:
    """The query of a TL;DR record or of the `info` of a comparison; articles have a format of their own."""
    if record.get("article") and not record.get("post"):
        template, field, length = text_format.article, "article", text_format.max_article_length
    else:
        template, field, length = text_format.query, "post", text_format.max_query_length
    required_text(record, field)
    return fit_query(tokenizer, template, record, field, length)


def plain_query(record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> tuple[str, list[int]]:
    """A generic `prompt`, as it is."""
    prompt = required_text(record, "prompt")
    ids = encode(tokenizer, prompt)
    if len(ids) > text_format.max_query_length:
        raise UnfittableError(f"the prompt has {len(ids)} tokens, more than {text_format.max_query_length}")
    return prompt, ids


def demonstration(
    record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat, schema: str, need_response: bool
) -> Record:
    """Columns of one demonstration.

    Args:
        schema: `tldr` (`subreddit, title, post, summary`) or `plain` (`prompt, completion`).
        need_response: whether a record without a response is a bad one.
    """
    if schema == "tldr":
        query, ids = tldr_query(record, tokenizer, text_format)
        column = "summary"
    else:
        query, ids = plain_query(record, tokenizer, text_format)
        column = "completion"
    response = required_text(record, column) if need_response else str(record.get(column) or "")
    response = one_leading_space(response) if schema == "tldr" and response else response
    joint = join_response(tokenizer, query, ids, response, text_format.max_response_length)
    return {"query": query, "reference": response, "query_ids": ids, **joint}


def comparison(record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat, schema: str) -> Record:
    """Columns of one comparison.

    Args:
        schema: `openai` (`info, summaries, choice, ...`) or `plain` (`prompt, chosen, rejected`).
    """
    max_length = text_format.max_response_length
    extra: Record = {"batch": "", "confidence": None, "chosen_policy": "", "rejected_policy": ""}
    if schema == "openai":
        info = record["info"] or {}
        query, ids = tldr_query(info, tokenizer, text_format)
        if info.get("article") and not info.get("post"):
            max_length = text_format.max_article_response_length
        summaries, choice = record["summaries"] or [], record["choice"]
        if len(summaries) != 2 or None in summaries:
            raise BadRecordError(f"{len([s for s in summaries if s])} summaries instead of 2")
        if choice not in (0, 1):
            raise BadRecordError(f"choice {choice} is out of range")
        pair = [summaries[int(choice)], summaries[1 - int(choice)]]
        chosen, rejected = (one_leading_space(required_text(s, "text")) for s in pair)
        extra = {
            "batch": record.get("batch") or "",
            "confidence": (record.get("extra") or {}).get("confidence"),
            "chosen_policy": pair[0].get("policy") or "",
            "rejected_policy": pair[1].get("policy") or "",
        }
    else:
        query, ids = plain_query(record, tokenizer, text_format)
        chosen, rejected = required_text(record, "chosen"), required_text(record, "rejected")
    if chosen == rejected:
        raise BadRecordError("chosen and rejected are equal")
    sides = [join_response(tokenizer, query, ids, text, max_length) for text in (chosen, rejected)]
    return {
        "query": query,
        "chosen_text": chosen,
        "rejected_text": rejected,
        "chosen_ids": sides[0]["input_ids"],
        "rejected_ids": sides[1]["input_ids"],
        "truncated": sides[0]["truncated"] or sides[1]["truncated"],
        **extra,
    }


def name_of(record: Record, index: int) -> str:
    """How a message names a record: its number, and its id where it has one."""
    known = record.get("id") or (record.get("info") or {}).get("id")
    return f"record {index + 1}" + (f" (id {known})" if known else "")


def unfittable_error(record: Record, index: int, error: UnfittableError, setting: str) -> UserError:
    """The sentence for a query that does not fit."""
    return UserError(
        f"{setting}: {name_of(record, index)}: {error}; raise data.text.max_query_length, or set "
        "data.text.drop_unfittable to true."
    )
