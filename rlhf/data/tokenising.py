"""Processing of whole datasets: once, on one rank, cached by `datasets`, with a report of what was left out."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pyarrow.compute
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlhf.data.chat import as_messages, is_conversation, take_chat_template
from rlhf.data.formats import (
    comparison,
    comparison_schemas,
    demonstration,
    demonstration_schemas,
    prompt_schemas,
)
from rlhf.data.quality import quality_issues
from rlhf.data.sources import Schemas, Source, find_columns, load_records
from rlhf.data.texts import BadRecordError, Record, TextFormat, UnfittableError, fields_of
from rlhf.errors import UserError
from rlhf.models.tokenizers import content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arrow would guess the types from the first rows, which may all be empty.
TEXT, NUMBER, FLAG, IDS = Value("string"), Value("int64"), Value("bool"), List(Value("int64"))
DEMONSTRATION_COLUMNS = {
    "query": TEXT, "reference": TEXT, "query_ids": IDS, "input_ids": IDS, "response_start": NUMBER, "turns": IDS,
    "truncated": FLAG, "glued": FLAG, "special": FLAG,
}  # fmt: skip
COMPARISON_COLUMNS = {
    "query": TEXT, "chosen_text": TEXT, "rejected_text": TEXT, "chosen_ids": IDS, "rejected_ids": IDS,
    "chosen_start": NUMBER, "rejected_start": NUMBER,
    "truncated": FLAG, "glued": FLAG, "special": FLAG, "equal": FLAG, "blanks": FLAG,
    "batch": TEXT, "confidence": NUMBER, "chosen_policy": TEXT, "rejected_policy": TEXT,
}  # fmt: skip
_VERSION = 5  # part of the cache key: raise it when the processing of a record changes


def load_demonstrations(
    source: Source, setting: str, tokenizer: PreTrainedTokenizerBase, text: TextFormat, need_response: bool = True
) -> Dataset:
    """Loads demonstrations (without `need_response`, prompts): `DEMONSTRATION_COLUMNS`, and the `record` as JSON."""
    process = partial(demonstration, need_response=need_response)
    schemas = demonstration_schemas(text) if need_response else prompt_schemas(text)
    return _load(source, setting, tokenizer, text, schemas, process, DEMONSTRATION_COLUMNS)


def load_comparisons(source: Source, setting: str, tokenizer: PreTrainedTokenizerBase, text: TextFormat) -> Dataset:
    """Loads comparisons: `COMPARISON_COLUMNS`, and the `record` as JSON."""
    return _load(source, setting, tokenizer, text, comparison_schemas(text), comparison, COMPARISON_COLUMNS)


def lengths(rows: Dataset, column: str) -> list[int]:
    """Returns the length of every list in a column, without making lists of them."""
    return pyarrow.compute.list_value_length(rows.with_format("arrow")[:][column]).to_pylist()


def largest_id(rows: Dataset, column: str) -> int:
    """Returns the largest token id in a column of lists."""
    ids = pyarrow.compute.list_flatten(rows.with_format("arrow")[:][column])
    return int(pyarrow.compute.max(ids).as_py() or 0)


def _load(
    source: Source,
    setting: str,
    tokenizer: PreTrainedTokenizerBase,
    text: TextFormat,
    schemas: Schemas,
    process: Callable[..., Record],
    columns: Record,
) -> Dataset:
    raw = load_records(source, setting)
    schema = find_columns(raw, schemas, setting, source.path)
    _check_formats(raw, text, schemas, schema, setting, source.path)
    take_chat_template(tokenizer, text.chat_template)
    wanted = (schemas[schema], [*columns], getattr(process, "keywords", None))
    features = Features({**columns, "record": TEXT, "problem": TEXT})

    def one(record: Record, index: int) -> Record:
        row = dict.fromkeys(features)
        record = {name: as_messages(value) for name, value in record.items()}
        try:
            row |= process(record, tokenizer, text, schema)
            messages = row.pop("messages", None)
            whole = dict(record)
            if messages is not None:
                whole["prompt"] = messages
            elif is_conversation(record.get("prompt")):  # a format made a text of it
                whole["prompt"] = row["query"]
            return row | {"record": json.dumps(whole, default=str), "problem": ""}
        except BadRecordError as error:
            if isinstance(error, UnfittableError) and not text.drop_unfittable:
                raise UserError(
                    f"{setting}: {_name(record, index)}, counting from 1: {error}; raise "
                    "data.text.max_query_length, or set data.text.drop_unfittable to true."
                ) from error
            return row | {"problem": str(error)}
        except (AttributeError, TypeError, ValueError) as error:
            return row | {"problem": f"not in the form of its schema ({error})"}

    done = raw.map(
        one,
        with_indices=True,
        remove_columns=raw.column_names,
        features=features,
        new_fingerprint=Hasher.hash((_VERSION, raw._fingerprint, schema, wanted, text, content(tokenizer))),
        desc=f"Tokenising {source.path} ({source.split})",
    )
    if source.part is not None:
        own = rows_of_part(done, source, setting)[: source.limit]
        raw, done = raw.select(own), done.select(own)
    control = text.special_tokens == "control"
    return _without_bad_records(raw, done, f"{setting}: {source.path} ({source.split})", control)


def rows_of_part(rows: Dataset, source: Source, setting: str) -> list[int]:
    """Returns the rows of tokenised records that belong to the part of their source."""
    own = [row for row, query in enumerate(rows["query"][:]) if query is None or source.has(query)]
    if not own:
        raise UserError(
            f"{setting}: no query of {source.path} falls into the part {source.part}; make it larger with "
            f"{setting}.part (of a pipeline: --validation)."
        )
    return own


def _check_formats(raw: Dataset, text: TextFormat, schemas: Schemas, schema: str, setting: str, path: str) -> None:
    """Names formats that nothing uses, and columns of formats that are not there."""
    given = {"query": text.query != TextFormat.query, "prompt": text.prompt, "completion": text.completion}
    used = {"tldr": {"query"}, "openai": {"query"}, "plain": {"prompt", "completion"}, "pair": {"prompt"}}
    for name in (name for name in given if given[name] and name not in used.get(schema, {"prompt"})):
        rank_zero_warn(
            f"data.text.{name} is not used for {setting}, {path}: its records are read as {', '.join(schemas[schema])}."
        )
    for name, template in (("prompt", text.prompt), ("completion", text.completion)):
        missing = [field for field in fields_of(template or "") if field not in raw.column_names]
        if missing and len(missing) == len(fields_of(template or "")):
            raise UserError(
                f"data.text.{name}: {setting}, {path}, has none of the columns {', '.join(missing)}; it has "
                f"{', '.join(raw.column_names)}."
            )
        if missing:
            rank_zero_warn(f"data.text.{name}: {setting}, {path}, has no column {', '.join(missing)}: no text there.")


def _name(record: Record, index: int) -> str:
    info = record.get("info")
    known = record.get("id") or (info.get("id") if isinstance(info, dict) else None)
    return f"record {index + 1}" + (f" (id {known})" if known else "")


def _without_bad_records(raw: Dataset, done: Dataset, name: str, control: bool) -> Dataset:
    problems = done["problem"][:]
    counts = collections.Counter(filter(None, problems))
    if counts:
        reasons = "; ".join(
            f"{reason}: {count}, first in {_name(raw[problems.index(reason)], problems.index(reason))}"
            for reason, count in counts.most_common(5)
        )
        reasons += "; records count from 1"
        if counts.total() == len(problems):
            raise UserError(f"{name}: none of the {len(problems)} records can be used ({reasons}).")
        rank_zero_warn(f"{name}: left out {counts.total()} of {len(problems)} records ({reasons}).")
        done = done.select([i for i, problem in enumerate(problems) if not problem])
    if truncated := sum(done["truncated"][:]):
        share = f"{truncated} of {len(problems)} responses ({truncated / len(problems):.1%})"
        rank_zero_info(f"{name}: {share} are longer than their maximum; they lost their end and EOS.")
    for issue in quality_issues(done, control):
        rank_zero_warn(f"{name}: {issue.sentence}")
    return done.remove_columns("problem")
