"""The reward model's margin of every comparison, as a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.checks import at_least
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_comparisons
from rlhf.evaluation import fingerprints
from rlhf.evaluation.resumable import Parts, Ranks, ranks, slice_of
from rlhf.evaluation.reward_scorer import RewardScorer, gold_columns
from rlhf.evaluation.tables import claim, read_table
from rlhf.models.loading import check_reward_model, load_config, load_tokenizer

if TYPE_CHECKING:
    import pandas as pd

_BATCHES = 16  # per part

COMPARISON_TEXT = TextFormat(max_response_length=169)


def margins(
    output: str,
    reward: str,
    data: Source,
    text: TextFormat = COMPARISON_TEXT,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Write the reward model's margin of every comparison of a split to one table.

    A killed run goes on from where it was, and several processes share the work when `torchrun` starts them.

    Args:
        output: file of the table, ends in .parquet or .csv.
        reward: export of the reward model.
        data: comparisons; `split` says which split.
        text: formats and maximum lengths.
        batch_size: texts that go through the model at a time.

    Returns:
        The table, a row per pair: `split` (`posts`, or `news` for CNN/DM pairs), `batch`, `confidence`,
        `chosen_policy`, `rejected_policy`, `margin` (reward of the chosen response minus that of the rejected one) and,
        on embedded data, `gold_margin`.
    """
    _check(reward, batch_size)
    file, size = Path(output), _BATCHES * batch_size
    with ranks() as processes:
        rows = _load(reward, data, text, processes)
        contents = (row[column] for row in rows for column in ("query", "chosen_text", "rejected_text", "record"))
        settings = {
            "reward": fingerprints.of_model(reward, "reward"),
            "data": fingerprints.of_texts(contents),
            "text": asdict(text),
        }
        if claim(file, settings, write=processes.rank == 0):
            if processes.rank == 0:
                print(f"{file} is finished, with these settings; it is kept.")
            return read_table(file, "output")
        parts = Parts(file, len(rows), size, processes)
        parts.make("margins", f"Scoring with {reward}", lambda: _maker(reward, rows, size, batch_size))
        table = parts.merge("margins")
        if processes.rank == 0:
            print(f"{len(table)} pairs: {file}")
        return table


def comparison_margins(
    reward: str, data: Source, text: TextFormat = COMPARISON_TEXT, batch_size: int = 64
) -> pd.DataFrame:
    """The table of `margins`, in this process and without a file."""
    _check(reward, batch_size)
    return _table(RewardScorer(reward, "reward", batch_size), _load(reward, data, text, Ranks()))


def _check(reward: str, batch_size: int) -> None:
    at_least("batch_size", batch_size, 1)
    check_reward_model(load_config(reward, "reward"), reward, "reward")


def _load(reward: str, data: Source, text: TextFormat, processes: Ranks) -> list[dict[str, Any]]:
    with processes.first_alone():
        return load_comparisons(data, "data", load_tokenizer(reward, setting="reward"), text).to_list()


def _maker(reward: str, rows: list[dict[str, Any]], size: int, batch_size: int) -> Callable[[int], pd.DataFrame]:
    scorer = RewardScorer(reward, "reward", batch_size)
    return lambda number: _table(scorer, slice_of(rows, number, size))


def _table(scorer: RewardScorer, rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    queries, chosen, rejected = ([row[name] for row in rows] for name in ("query", "chosen_text", "rejected_text"))
    named = {name: [row[name] for row in rows] for name in ("batch", "confidence", "chosen_policy", "rejected_policy")}
    margin = [a - b for a, b in zip(scorer(queries, chosen), scorer(queries, rejected), strict=True)]
    split = ["news" if "cnndm" in batch else "posts" for batch in named["batch"]]
    table = pd.DataFrame({"split": split, **named, "margin": margin}).astype({"confidence": "Int64"})
    records = [json.loads(row["record"]) for row in rows]
    gold = gold_columns(queries, records, chosen=chosen, rejected=rejected)
    if gold:
        table["gold_margin"] = [a - b for a, b in zip(gold["chosen"], gold["rejected"], strict=True)]
    return table
