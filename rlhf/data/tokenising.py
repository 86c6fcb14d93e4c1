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

from rlhf.data.sources import Schemas, Source, find_columns, load_records
from rlhf.data.texts import BadRecordError, Record, TextFormat, UnfittableError, comparison, demonstration
from rlhf.errors import UserError
from rlhf.models.tokenizers import content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMONSTRATIONS: Schemas = {"tldr": ("subreddit", "title", "post", "summary"), "plain": ("prompt", "completion")}
PROMPTS: Schemas = {"tldr": ("subreddit", "title", "post"), "plain": ("prompt",)}
COMPARISONS: Schemas = {"openai": ("info", "summaries", "choice"), "plain": ("prompt", "chosen", "rejected")}

# Arrow would guess the types from the first rows, which may all be empty.
TEXT, NUMBER, FLAG, IDS = Value("string"), Value("int64"), Value("bool"), List(Value("int64"))
DEMONSTRATION_COLUMNS = {
    "query": TEXT, "reference": TEXT, "query_ids": IDS, "input_ids": IDS, "response_start": NUMBER, "truncated": FLAG,
}  # fmt: skip
COMPARISON_COLUMNS = {
    "query": TEXT, "chosen_text": TEXT, "rejected_text": TEXT, "chosen_ids": IDS, "rejected_ids": IDS,
    "truncated": FLAG, "batch": TEXT, "confidence": NUMBER, "chosen_policy": TEXT, "rejected_policy": TEXT,
}  # fmt: skip
_VERSION = 2  # part of the cache key: raise it when the processing of a record changes


def load_demonstrations(
    source: Source, setting: str, tokenizer: PreTrainedTokenizerBase, text: TextFormat, need_response: bool = True
) -> Dataset:
    """Loads demonstrations (without `need_response`, prompts): `DEMONSTRATION_COLUMNS`, and the `record` as JSON."""
    process = partial(demonstration, need_response=need_response)
    schemas = DEMONSTRATIONS if need_response else PROMPTS
    return _load(source, setting, tokenizer, text, schemas, process, DEMONSTRATION_COLUMNS)


def load_comparisons(source: Source, setting: str, tokenizer: PreTrainedTokenizerBase, text: TextFormat) -> Dataset:
    """Loads comparisons: `COMPARISON_COLUMNS`, and the `record` as JSON."""
    return _load(source, setting, tokenizer, text, COMPARISONS, comparison, COMPARISON_COLUMNS)


def lengths(rows: Dataset, column: str) -> list[int]:
    """Returns the length of every list in a column, without making lists of them."""
    return pyarrow.compute.list_value_length(rows.with_format("arrow")[:][column]).to_pylist()


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
    features = Features({**columns, "record": TEXT, "problem": TEXT})

    def one(record: Record, index: int) -> Record:
        row = dict.fromkeys(features)
        try:
            row |= process(record, tokenizer, text, schema)
            return row | {"record": json.dumps(dict(record), default=str), "problem": ""}
        except BadRecordError as error:
            if isinstance(error, UnfittableError) and not text.drop_unfittable:
                raise UserError(
                    f"{setting}: {_name(record, index)}: {error}; raise data.text.max_query_length, or set "
                    "data.text.drop_unfittable to true."
                ) from error
            return row | {"problem": str(error)}
        except (AttributeError, TypeError, ValueError) as error:
            return row | {"problem": f"not in the form of its schema ({error})"}

    done = raw.map(
        one,
        with_indices=True,
        remove_columns=raw.column_names,
        features=features,
        new_fingerprint=Hasher.hash((_VERSION, raw._fingerprint, schema, schemas[schema], text, content(tokenizer))),
        desc=f"Tokenising {source.path} ({source.split})",
    )
    return _without_bad_records(raw, done, f"{setting}: {source.path} ({source.split})")


def _name(record: Record, index: int) -> str:
    known = record.get("id") or (record.get("info") or {}).get("id")
    return f"record {index + 1}" + (f" (id {known})" if known else "")


def _without_bad_records(raw: Dataset, done: Dataset, name: str) -> Dataset:
    problems = done["problem"][:]
    counts = collections.Counter(filter(None, problems))
    if counts:
        reasons = "; ".join(
            f"{reason}: {count}, first in {_name(raw[problems.index(reason)], problems.index(reason))}"
            for reason, count in counts.most_common(5)
        )
        if counts.total() == len(problems):
            raise UserError(f"{name}: none of the {len(problems)} records can be used ({reasons}).")
        rank_zero_warn(f"{name}: left out {counts.total()} of {len(problems)} records ({reasons}).")
        done = done.select([i for i, problem in enumerate(problems) if not problem])
    if truncated := sum(done["truncated"][:]):
        share = f"{truncated} of {len(problems)} responses ({truncated / len(problems):.1%})"
        rank_zero_info(f"{name}: {share} are longer than their maximum; they lost their end and EOS.")
    return done.remove_columns("problem")
