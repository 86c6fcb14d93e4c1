"""Processing of whole datasets: once, on one rank, cached by `datasets`, with a report of what was left out."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlhf.data.sources import Source, find_columns, load_records
from rlhf.data.texts import (
    BadRecordError,
    Record,
    TextFormat,
    UnfittableError,
    comparison,
    demonstration,
    name_of,
    unfittable_error,
)
from rlhf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Schemas = dict[str, tuple[str, ...]]

DEMONSTRATIONS: Schemas = {"tldr": ("subreddit", "title", "post", "summary"), "plain": ("prompt", "completion")}
PROMPTS: Schemas = {"tldr": ("subreddit", "title", "post"), "plain": ("prompt",)}
COMPARISONS: Schemas = {"openai": ("info", "summaries", "choice"), "plain": ("prompt", "chosen", "rejected")}
_VERSION = 1  # part of the cache key: raise it when the processing of a record changes


def load_demonstrations(
    source: Source, setting: str, tokenizer: PreTrainedTokenizerBase, text: TextFormat, need_response: bool = True
) -> Dataset:
    """Demonstrations (or, without `need_response`, prompts) as token ids.

    Columns: `query`, `reference` (texts), `query_ids`, `input_ids`, `response_start`, `truncated`, and the whole
    `record` as JSON.
    """
    raw = load_records(source, setting)
    schema = find_columns(raw, DEMONSTRATIONS if need_response else PROMPTS, setting, source.path)
    process = partial(demonstration, schema=schema, need_response=need_response)
    empty = {"query": "", "reference": "", "query_ids": [], "input_ids": [], "response_start": 0, "truncated": False}
    return _process(raw, process, empty, source, setting, tokenizer, text, f"{schema}/{need_response}")


def load_comparisons(source: Source, setting: str, tokenizer: PreTrainedTokenizerBase, text: TextFormat) -> Dataset:
    """Comparisons as token ids.

    Columns: `query`, `chosen_text`, `rejected_text`, `chosen_ids`, `rejected_ids`, `truncated`, `batch`, `confidence`,
    `chosen_policy`, `rejected_policy`, and the whole `record` as JSON.
    """
    raw = load_records(source, setting)
    schema = find_columns(raw, COMPARISONS, setting, source.path)
    empty = {
        "query": "", "chosen_text": "", "rejected_text": "", "chosen_ids": [], "rejected_ids": [], "truncated": False,
        "batch": "", "confidence": None, "chosen_policy": "", "rejected_policy": "",
    }  # fmt: skip
    return _process(raw, partial(comparison, schema=schema), empty, source, setting, tokenizer, text, schema)


def _process(
    raw: Dataset,
    process: Callable[..., Record],
    empty: Record,
    source: Source,
    setting: str,
    tokenizer: PreTrainedTokenizerBase,
    text: TextFormat,
    schema: str,
) -> Dataset:
    from datasets import Features
    from datasets.fingerprint import Hasher

    empty = {**empty, "record": ""}

    def one(record: Record, index: int) -> Record:
        try:
            return {**process(record, tokenizer, text), "problem": "", "record": json.dumps(dict(record), default=str)}
        except UnfittableError as error:
            if not text.drop_unfittable:
                raise unfittable_error(record, index, error, setting) from error
            return {**empty, "problem": str(error)}
        except BadRecordError as error:
            return {**empty, "problem": str(error)}
        except (AttributeError, TypeError, ValueError) as error:
            return {**empty, "problem": f"not of the form of its kind ({error})"}

    identity = (_VERSION, raw._fingerprint, schema, text, _content(tokenizer))
    features = Features({name: _kind(name) for name in (*empty, "problem")})
    description = f"Tokenising {source.path} ({source.split})"
    done = raw.map(
        one,
        with_indices=True,
        remove_columns=raw.column_names,
        features=features,
        new_fingerprint=Hasher.hash(identity),
        desc=description,
    )
    return _report(raw, done, source, setting)


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides a tokenizer's output, for the key of the cache; padding and truncation change with every use."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"padding": None, "truncation": None, "eos": tokenizer.eos_token_id}
    return json.dumps(content, sort_keys=True)


def _kind(column: str) -> Any:
    """The type of a column that is added: Arrow would guess it from the first rows, which may all be empty."""
    from datasets import List, Value

    if column.endswith("_ids"):
        return List(Value("int64"))
    return Value({"response_start": "int64", "confidence": "int64", "truncated": "bool"}.get(column, "string"))


def _report(raw: Dataset, done: Dataset, source: Source, setting: str) -> Dataset:
    problems = done["problem"][:]
    bad = [i for i, problem in enumerate(problems) if problem]
    truncated = sum(done["truncated"][:])
    name = f"{setting}: {source.path} ({source.split})"
    if bad:
        reasons = "; ".join(
            f"{reason}: {count}, first in {name_of(raw[problems.index(reason)], problems.index(reason))}"
            for reason, count in collections.Counter(problems[i] for i in bad).most_common(5)
        )
        if len(bad) == len(problems):
            raise UserError(f"{name}: none of the {len(problems)} records can be used ({reasons}).")
        rank_zero_warn(f"{name}: left out {len(bad)} of {len(problems)} records ({reasons}).")
        done = done.select([i for i, problem in enumerate(problems) if not problem])
    if truncated:
        share = f"{truncated} of {len(problems)} responses ({truncated / len(problems):.1%})"
        rank_zero_info(f"{name}: {share} are longer than their maximum; they lost their end and EOS.")
    return done.remove_columns("problem")


def lengths(rows: Dataset, column: str) -> list[int]:
    """Length of every list in a column, without making lists of them."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(rows.with_format("arrow")[:][column]).to_pylist()
