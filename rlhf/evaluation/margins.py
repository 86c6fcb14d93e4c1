"""The reward model's margin of every comparison, as a table."""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from pydantic import PositiveInt

from rlhf import files
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_comparisons
from rlhf.evaluation.resumable import Parts, Row, ranks
from rlhf.evaluation.reward_scorer import RewardScorer, gold_columns, whole_sequences
from rlhf.hardware import Precision, weights_precision
from rlhf.models.classifiers import register_classifier
from rlhf.models.loading import check_reward_model, model_fingerprint
from rlhf.models.tokenizers import PAD_TOKEN, load_tokenizer

_BATCHES = 16  # per part
_TEXTS = ("query", "chosen_text", "rejected_text", "record")


def margins(
    output: str,
    reward: str,
    data: Source,
    text: TextFormat = TextFormat(max_response_length=169),
    batch_size: PositiveInt = 64,
    precision: Precision = "auto",
) -> pd.DataFrame:
    """Writes the reward model's margin of every comparison of a split to one table.

    A killed run resumes where it was, and several processes share the work when `torchrun` starts them. The columns of
    the table are described in docs/evaluation.md.

    Args:
        output: file of the table, ends in .parquet or .csv.
        reward: export of the reward model.
        data: comparisons; `split` says which split.
        text: formats and maximum lengths.
        batch_size: texts that go through the model at a time.
        precision: of the weights; `auto` is bfloat16 on GPUs and float32 on CPUs.
    """
    tokenizer = check_model(reward)
    with ranks(output) as processes:
        with processes.first_alone():
            rows = load_comparisons(data, "data", tokenizer, text).to_list()
        contents = (str(row[c]) for row in rows for c in (*_TEXTS, "chosen_ids", "rejected_ids"))
        settings = {
            "reward": model_fingerprint(reward, "reward"),
            "data": files.fingerprint(contents),
            "text": asdict(text),
            "precision": weights_precision(precision),
        }
        parts = Parts(output, settings, rows, _BATCHES * batch_size, processes)
        control = text.special_tokens == "control"
        load = partial(RewardScorer, reward, "reward", batch_size, None, control, precision)
        parts.make("margins", f"Scoring with {reward}", lambda: partial(_margins, load()))
        return parts.merge()


def check_model(reward: str) -> Any:
    """Refuses a model that is no reward model, and returns its tokenizer; no weights are loaded."""
    register_classifier(check_reward_model(reward, "reward"), "reward")
    return load_tokenizer(reward, PAD_TOKEN, "reward")


def _margins(scorer: RewardScorer, rows: list[Row]) -> pd.DataFrame:
    texts = pd.DataFrame(rows)
    table = texts[["batch", "confidence", "chosen_policy", "rejected_policy"]].astype({"confidence": "Int64"})
    table.insert(0, "split", np.where(table["batch"].str.contains("cnndm"), "news", "posts"))
    chosen, rejected = (
        scorer.score_ids(whole_sequences(scorer.tokenizer, rows, f"{side}_ids", f"{side}_text", scorer.control))
        for side in ("chosen", "rejected")
    )
    table["margin"] = np.subtract(chosen, rejected)
    if gold := gold_columns(texts, chosen="chosen_text", rejected="rejected_text"):
        table["gold_margin"] = np.subtract(gold["chosen"], gold["rejected"])
    return table
