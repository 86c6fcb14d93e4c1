"""How texts become token ids: settings, the TL;DR query and its truncation, one joint sequence (D01 to D07)."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, PositiveInt, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlhf.models.tokenizers import encode, eos_ids, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]


@dataclass(frozen=True, config=ConfigDict(title="data.text"))
class TextFormat:
    """How texts are made and how long they may be; the defaults are the paper's. docs/data.md has examples.

    Attributes:
        query: format of a TL;DR query; fields are columns of the record (D01).
        article: format of a CNN/DM query.
        prompt: format of a prompt from your own columns, for example `"{instruction}\\n{input}\\n"`; a field that is
            missing or empty leaves no text. null: the column `prompt`.
        completion: format of a completion likewise. null: the column `completion`.
        separator: text between a prompt and its responses; it belongs to the responses.
        join: text between the texts of a column that holds lists of texts; null: such a column is refused.
        last_turn: what begins the last turn of comparisons without a prompt; all up to there is the prompt.
        chat_template: Jinja template of conversations, or a file with one; null: the tokenizer's own.
        special_tokens: whether special tokens inside of texts are `text` or `control` ids. Those that a chat template
            writes are always control ids.
        max_query_length: longest query in tokens; a TL;DR post is cut until its query fits (D02).
        max_article_length: longest query with an article, which is cut likewise.
        max_response_length: longest response in tokens, EOS included (D06).
        max_article_response_length: longest summary of an article.
        drop_unfittable: leave out a query that cannot be made to fit instead of stopping.
    """

    query: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    article: str = "Article:\n{article}\n\nTL;DR:\n"
    prompt: str | None = None
    completion: str | None = None
    separator: str = ""
    join: str | None = None
    last_turn: str = "\n\nAssistant:"
    chat_template: str | None = None
    special_tokens: Literal["text", "control"] = "text"
    max_query_length: PositiveInt = 512
    max_article_length: PositiveInt = 1919
    max_response_length: PositiveInt = 53
    max_article_response_length: PositiveInt = 155
    drop_unfittable: bool = False

    @field_validator("query", "article", "prompt", "completion")
    @classmethod
    def _is_format(cls, template: str | None) -> str | None:
        try:
            list(string.Formatter().parse(template or ""))
        except ValueError as error:
            raise PydanticCustomError(
                "format", "Input should be a format string ({why})", {"why": str(error)}
            ) from error
        return template


class BadRecordError(Exception):
    """A record cannot be used; the message is the reason, the same for all records of its kind."""


class UnfittableError(BadRecordError):
    """No allowed cut makes a query short enough."""


def fields_of(template: str) -> tuple[str, ...]:
    """Returns the columns that a format names."""
    names = (name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
    return tuple(dict.fromkeys(name.partition(".")[0].partition("[")[0] for name in names))


def join_response(
    tokenizer: PreTrainedTokenizerBase,
    query: str,
    query_ids: list[int],
    response: str,
    max_response_length: int,
    control: bool = False,
) -> Record:
    """Tokenises query and response as one text (D07) with one EOS at its end (D04), also if the response has it.

    Returns:
        `input_ids`; `response_start`, the first position that does not belong to the query; `truncated`: whether the
        response is too long and loses its end, and EOS with it (D06); and `reference`, the response without EOS.
    """
    response, eos = without_eos(tokenizer, response)
    ids = encode(tokenizer, query + response, control)
    row = end_response(ids, border(ids, query_ids), eos, max_response_length)
    return {**row, "reference": response}


def border(ids: list[int], query_ids: list[int]) -> int:
    """Returns the first position of joint token ids that does not belong to the query."""
    start = len(query_ids)
    if ids[:start] != query_ids:  # a token spans the border: it belongs to the response
        pairs = zip(ids, query_ids, strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ids))
    return start


def end_response(ids: list[int], start: int, eos: int, max_response_length: int) -> Record:
    """Ends joint token ids with EOS and cuts the response to its maximum (D06)."""
    ids = [*ids, eos]
    limit = start + max_response_length
    return {"input_ids": ids[:limit], "response_start": start, "truncated": len(ids) > limit}


def without_eos(tokenizer: PreTrainedTokenizerBase, response: str) -> tuple[str, int]:
    """Takes the text of an EOS off the end of a response; returns the rest, and the id of the EOS that ends it."""
    special = special_tokens(tokenizer)
    for token, number in special.items():
        if number in eos_ids(tokenizer) and (stripped := response.rstrip()).endswith(token):
            return stripped.removesuffix(token), number
    return response, eos_ids(tokenizer)[0]


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
    if field in fields_of(template):
        required_text(record, field)
    fields = {name: "" if value is None else value for name, value in record.items()}
    while True:
        try:
            text = template.format(**fields)
        except (KeyError, IndexError) as error:
            raise BadRecordError(f"the query format needs the field {error}") from error
        ids = encode(tokenizer, text, text_format.special_tokens == "control")
        if len(ids) <= max_length:
            return text, ids
        body = fields[field] if field in fields_of(template) else ""
        if not body:
            raise UnfittableError(f"tokens of the query without any {field}: more than {max_length}")
        cut = body.rfind("\n")
        # One character at a time is slow, and no character is worth more than 4 tokens.
        surplus = max(1, (len(ids) - max_length) // 4)
        fields[field] = body[: cut if cut >= 0 else -surplus]


def plain_query(prompt: str, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> list[int]:
    """Returns the token ids of a prompt, which is never cut."""
    ids = encode(tokenizer, prompt, text_format.special_tokens == "control")
    if len(ids) > text_format.max_query_length:
        raise UnfittableError(f"tokens of the prompt: more than {text_format.max_query_length}")
    return ids
