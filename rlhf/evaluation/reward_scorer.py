"""Numbers for responses: the reward of a reward model, the gold score of the embedded data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from rlhf.data.chat import answered_ids, conversation_of
from rlhf.hardware import Precision, best_device, weights_precision
from rlhf.models.finite import check_finite
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import PAD_TOKEN, check_row, encode, eos_ids, load_tokenizer, retokenise, same_tokens
from rlhf.ops.sequences import pad_sequences
from rlhf.synthetic.gold_score import gold_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardScorer:
    """A reward model that reads token ids or texts, `batch_size` at a time.

    Args:
        ids_of: the tokenizer of the token ids, which may be another one than the reward model's.
        control: whether special tokens in texts become control ids.
        precision: of the weights; rewards are float32.
    """

    def __init__(
        self,
        path: str,
        setting: str = "reward",
        batch_size: int = 64,
        ids_of: PreTrainedTokenizerBase | None = None,
        control: bool = False,
        precision: Precision = "auto",
    ) -> None:
        self.tokenizer = load_tokenizer(path, PAD_TOKEN, setting)
        self.other = None if ids_of is None or same_tokens(ids_of, self.tokenizer) else ids_of
        self.device = best_device()
        dtype = getattr(torch, weights_precision(precision))
        self.model = ScalarModel.from_pretrained(path, setting, dtype).to(self.device).eval()
        self.batch_size = batch_size
        self._path = path
        self.control = control
        self.name = f"{setting} {path}"

    def __call__(
        self, queries: Sequence[str], responses: Sequence[str], records: Sequence[Mapping[str, Any]] | None = None
    ) -> list[float]:
        """Computes the reward of each response, ended with EOS, to its query, or to the conversation of its record."""
        rows = zip(queries, responses, records or [{}] * len(queries), strict=True)
        return self._score([text_ids(self.tokenizer, *row, self.control) for row in rows])

    def score_ids(self, sequences: list[list[int]]) -> list[float]:
        """Computes the reward of each sequence of token ids at its end, EOS or not, as PPO does."""
        return self._score(retokenise(sequences, self.other, self.tokenizer) if self.other else sequences)

    @torch.no_grad()
    def _score(self, sequences: list[list[int]]) -> list[float]:
        scores: list[float] = []
        largest, rows = max(map(max, sequences), default=0), self.model.model.config.get_text_config().vocab_size
        check_row(largest, rows, self.tokenizer, self._path, "a text")
        for start in range(0, len(sequences), self.batch_size):
            ids, mask = pad_sequences(sequences[start : start + self.batch_size], self.tokenizer.pad_token_id)
            found = self.model.score(ids.to(self.device), mask.to(self.device))
            scores += check_finite(found, f"rewards by {self.name}").tolist()
        return scores


def text_ids(
    tokenizer: PreTrainedTokenizerBase, query: str, response: str, record: Mapping[str, Any], control: bool
) -> list[int]:
    """Returns the token ids of a query, or the conversation of its record, and of a response ended with EOS."""
    if messages := conversation_of(record):
        return answered_ids(tokenizer, messages, response)
    return [*encode(tokenizer, query + response, control), eos_ids(tokenizer)[0]]


def whole_sequences(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], ids: str, text: str, control: bool
) -> list[list[int]]:
    """Returns queries and responses as token ids with EOS, also where the column `ids` was cut at a maximum length.

    Args:
        ids, text: columns with both as token ids, and with the text of the response.
        control: whether special tokens in texts become control ids.
    """
    return [
        text_ids(tokenizer, row["query"], row[text], json.loads(row["record"]), control)
        if row["truncated"]
        else list(row[ids])
        for row in rows
    ]


def gold_columns(table: pd.DataFrame, **columns: str) -> dict[str, list[float]]:
    """Computes gold scores of columns of texts, if all records (JSON) of the table have hidden facts."""
    records = [json.loads(record) for record in table["record"]]
    if not all(isinstance(record.get("facts"), dict) for record in records):
        return {}
    queries = table["query"].tolist()
    return {new: gold_scores(queries, table[texts].tolist(), records) for new, texts in columns.items()}
