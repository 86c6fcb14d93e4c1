"""The margin of every comparison by a reward model or a policy of DPO, as a table."""

from collections.abc import Callable
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
from rlhf.errors import Positive
from rlhf.evaluation.log_ratios import log_ratios
from rlhf.evaluation.resumable import Parts, Row, ranks
from rlhf.evaluation.reward_scorer import RewardScorer, gold_columns, whole_sequences
from rlhf.hardware import Precision, weights_precision
from rlhf.models.classifiers import register_classifier
from rlhf.models.loading import check_language_model, check_reward_model, model_fingerprint
from rlhf.models.tokenizers import PAD_TOKEN, check_reference, load_tokenizer

_Score = Callable[[list[list[int]], list[int]], list[float]]  # sequences, and where responses begin -> rewards
_BATCHES = 16  # per part
_TEXTS = ("query", "chosen_text", "rejected_text", "record")


def margins(
    output: str,
    reward: str,
    data: Source,
    text: TextFormat = TextFormat(max_response_length=169),
    batch_size: PositiveInt = 64,
    precision: Precision = "auto",
    reference: str | None = None,
    beta: Positive = 0.05,
) -> pd.DataFrame:
    """Writes the margin of every comparison of a split, by a reward model or a policy of DPO, to one table.

    A killed run resumes where it was, and several processes share the work when `torchrun` starts them. The columns of
    the table are described in docs/evaluation.md.

    Args:
        output: file of the table, ends in .parquet or .csv.
        reward: export of the reward model, or with `reference` of a policy that DPO has trained.
        data: comparisons; `split` says which split.
        text: formats and maximum lengths.
        batch_size: texts that go through the model at a time.
        precision: of the weights; `auto` is bfloat16 on GPUs and float32 on CPUs.
        reference: the reference policy of DPO: rewards are then implicit, `beta x log(policy / reference)`.
        beta: `model.dpo.beta` of its training.
    """
    tokenizer = check_model(reward, reference)
    with ranks(output) as processes:
        with processes.first_alone():
            rows = load_comparisons(data, "data", tokenizer, text).to_list()
        contents = (str(row[c]) for row in rows for c in (*_TEXTS, "chosen_ids", "rejected_ids"))
        settings = {
            "reward": model_fingerprint(reward, "reward"),
            "data": files.fingerprint(contents),
            "text": asdict(text),
            "precision": weights_precision(precision),
            **({} if reference is None else {"reference": model_fingerprint(reference, "reference"), "beta": beta}),
        }
        parts = Parts(output, settings, rows, _BATCHES * batch_size, processes)
        control = text.special_tokens == "control"

        def load() -> _Score:
            if reference is not None:
                return _implicit(reward, reference, tokenizer, beta, batch_size, precision)
            scorer = RewardScorer(reward, "reward", batch_size, None, control, precision)
            return lambda sequences, _: scorer.score_ids(sequences)

        parts.make("margins", f"Scoring with {reward}", lambda: partial(_margins, load(), tokenizer, control))
        return parts.merge()


def check_model(reward: str, reference: str | None = None) -> Any:
    """Refuses models that give no reward, and returns their tokenizer; no weights are loaded."""
    tokenizer = load_tokenizer(reward, PAD_TOKEN, "reward")
    if reference is None:
        register_classifier(check_reward_model(reward, "reward"), "reward")
    else:
        check_language_model(reward, "reward")
        check_reference(reference, "reference", tokenizer)
    return tokenizer


def _implicit(
    policy: str, reference: str, tokenizer: Any, beta: float, batch_size: int, precision: Precision
) -> _Score:
    ratios = log_ratios(policy, reference, tokenizer.pad_token_id, 1.0, weights_precision(precision))

    def score(sequences: list[list[int]], starts: list[int]) -> list[float]:
        rows = [{"query_ids": s[:n], "response_ids": s[n:]} for s, n in zip(sequences, starts, strict=True)]
        parts = [ratios(rows[n : n + batch_size])["kl"] for n in range(0, len(rows), batch_size)]
        return (beta * pd.concat(parts)).tolist()

    return score


def _margins(score: _Score, tokenizer: Any, control: bool, rows: list[Row]) -> pd.DataFrame:
    texts = pd.DataFrame(rows)
    table = texts[["batch", "confidence", "chosen_policy", "rejected_policy"]].astype({"confidence": "Int64"})
    table.insert(0, "split", np.where(table["batch"].str.contains("cnndm"), "news", "posts"))
    chosen, rejected = (
        score(
            whole_sequences(tokenizer, rows, f"{side}_ids", f"{side}_text", control), [r[f"{side}_start"] for r in rows]
        )
        for side in ("chosen", "rejected")
    )
    table["margin"] = np.subtract(chosen, rejected)
    if gold := gold_columns(texts, chosen="chosen_text", rejected="rejected_text"):
        table["gold_margin"] = np.subtract(gold["chosen"], gold["rejected"])
    return table
