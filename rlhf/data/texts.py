"""From records to token ids: the TL;DR query and its truncation, the response, one joint sequence (D01 to D07)."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, PositiveInt, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlhf.models.tokenizers import encode, eos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]


@dataclass(frozen=True, config=ConfigDict(title="data.text"))
class TextFormat:
    """How texts are made and how long they may be; the defaults are the paper's.

    Attributes:
        query: format of a TL;DR query; fields are columns of the record (D01).
        article: format of a CNN/DM query.
        max_query_length: longest query in tokens; a TL;DR post is cut until its query fits (D02).
        max_article_length: longest query with an article, which is cut likewise.
        max_response_length: longest response in tokens, EOS included (D06).
        max_article_response_length: longest summary of an article.
        drop_unfittable: leave out a query that cannot be made to fit instead of stopping.
    """

    query: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    article: str = "Article:\n{article}\n\nTL;DR:\n"
    max_query_length: PositiveInt = 512
    max_article_length: PositiveInt = 1919
    max_response_length: PositiveInt = 53
    max_article_response_length: PositiveInt = 155
    drop_unfittable: bool = False

    @field_validator("query", "article")
    @classmethod
    def _is_format(cls, template: str) -> str:
        try:
            list(string.Formatter().parse(template))
        except ValueError as error:
            raise PydanticCustomError(
                "format", "Input should be a format string ({why})", {"why": str(error)}
            ) from error
        return template


class BadRecordError(Exception):
    """A record cannot be used; the message is the reason."""


class UnfittableError(BadRecordError):
    """No allowed cut makes a query short enough."""


def join_response(
    tokenizer: PreTrainedTokenizerBase, query: str, query_ids: list[int], response: str, max_response_length: int
) -> Record:
    """Tokenises query and response as one text (D07) with EOS at its end (D04).

    Returns:
        `input_ids`; `response_start`, the first position that does not belong to the query; and `truncated`: whether
        the response is too long and loses its end, and EOS with it (D06).
    """
    ids = encode(tokenizer, query + response)
    start = len(query_ids)
    if ids[:start] != query_ids:  # a token spans the border: it belongs to the response
        start = next(i for i, (a, b) in enumerate(zip(ids, query_ids, strict=False)) if a != b)
    ids = [*ids, eos_ids(tokenizer)[0]]
    limit = start + max_response_length
    return {"input_ids": ids[:limit], "response_start": start, "truncated": len(ids) > limit}


def one_leading_space(text: str) -> str:
    """Makes a response start with exactly one space (D04): the comparisons have it, the demonstrations lack it."""
    return " " + text.strip()


def required_text(record: Record, column: str) -> str:
    """Returns the text in a column that must hold some."""
    text = record.get(column)
    if isinstance(text, bool | int | float):  # a text in a CSV file, whose cells have no types
        raise BadRecordError(f"{column} is a {'truth value' if isinstance(text, bool) else 'number'} and no text")
    if not isinstance(text, str) or not text.strip():
        raise BadRecordError(f"empty {column}")
    return text


def is_article(record: Record) -> bool:
    """Tells a CNN/DM record from a TL;DR one."""
    return bool(record.get("article") and not record.get("post"))


def tldr_query(record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> tuple[str, list[int]]:
    """Fills the format of a query with a TL;DR record, or the `info` of a comparison, and cuts it until it fits (D02).

    The post (or article) is cut at its last newline, or by one character if it has none. Everything else survives.
    """
    template, field, max_length = text_format.query, "post", text_format.max_query_length
    if is_article(record):
        template, field, max_length = text_format.article, "article", text_format.max_article_length
    required_text(record, field)
    fields = {name: "" if value is None else value for name, value in record.items()}
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
        # One character at a time is slow, and no character is worth more than 4 tokens.
        surplus = max(1, (len(ids) - max_length) // 4)
        fields[field] = body[: cut if cut >= 0 else -surplus]


def plain_query(record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> tuple[str, list[int]]:
    """Returns a generic `prompt` as it is, as text and token ids."""
    prompt = required_text(record, "prompt")
    ids = encode(tokenizer, prompt)
    if len(ids) > text_format.max_query_length:
        raise UnfittableError(f"the prompt has {len(ids)} tokens, more than {text_format.max_query_length}")
    return prompt, ids


def demonstration(
    record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat, schema: str, need_response: bool
) -> Record:
    """Tokenises a demonstration of the schema `tldr` or `plain`, or with `need_response` false a mere prompt."""
    query_of, column = (tldr_query, "summary") if schema == "tldr" else (plain_query, "completion")
    query, ids = query_of(record, tokenizer, text_format)
    response = required_text(record, column) if need_response else str(record.get(column) or "")
    if schema == "tldr" and response:
        response = one_leading_space(response)
    joint = join_response(tokenizer, query, ids, response, text_format.max_response_length)
    return {"query": query, "reference": response, "query_ids": ids, **joint}


def comparison(record: Record, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat, schema: str) -> Record:
    """Tokenises both sides of a comparison of the schema `openai` or `plain`."""
    max_length = text_format.max_response_length
    row: Record = {"batch": "", "confidence": None, "chosen_policy": "", "rejected_policy": ""}
    if schema == "openai":
        info = record["info"] or {}
        query, ids = tldr_query(info, tokenizer, text_format)
        if is_article(info):
            max_length = text_format.max_article_response_length
        summaries, choice = record["summaries"] or [], record["choice"]
        if len(summaries) != 2 or None in summaries:
            raise BadRecordError(f"{len([s for s in summaries if s])} summaries instead of 2")
        if choice not in (0, 1):
            raise BadRecordError(f"choice {choice} is out of range")
        pair = [summaries[int(choice)], summaries[1 - int(choice)]]
        chosen, rejected = (one_leading_space(required_text(s, "text")) for s in pair)
        row = {
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
    row |= {"query": query, "chosen_text": chosen, "rejected_text": rejected, "truncated": False}
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        joint = join_response(tokenizer, query, ids, text, max_length)
        row[f"{side}_ids"] = joint["input_ids"]
        row["truncated"] |= joint["truncated"]
    return row
