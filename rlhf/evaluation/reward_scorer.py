"""Numbers for responses: the reward of a reward model, the gold score of the embedded data."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from rlhf.data.chat import answered_ids, conversation_of
from rlhf.hardware import best_device
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import encode, eos_ids, load_tokenizer
from rlhf.ops.sequences import pad_sequences
from rlhf.synthetic.gold_score import gold_scores


class RewardScorer:
    """A reward model that reads texts, `batch_size` at a time.

    Args:
        control: whether special tokens in the texts become control ids.
    """

    def __init__(self, path: str, setting: str = "reward", batch_size: int = 64, control: bool = False) -> None:
        self.tokenizer = load_tokenizer(path, setting=setting)
        self.device = best_device()
        self.model = ScalarModel.from_pretrained(path, setting).to(self.device).eval()
        self.batch_size = batch_size
        self.control = control

    @torch.no_grad()
    def __call__(
        self, queries: Sequence[str], responses: Sequence[str], records: Sequence[Mapping[str, Any]] | None = None
    ) -> list[float]:
        """Computes the reward of each response, ended with EOS, to its query or the conversation of its record."""
        sequences = [self._ids(*row) for row in zip(queries, responses, records or [{}] * len(queries), strict=True)]
        scores: list[float] = []
        for start in range(0, len(sequences), self.batch_size):
            ids, mask = pad_sequences(sequences[start : start + self.batch_size], self.tokenizer.pad_token_id)
            scores += self.model.score(ids.to(self.device), mask.to(self.device)).tolist()
        return scores

    def _ids(self, query: str, response: str, record: Mapping[str, Any]) -> list[int]:
        if messages := conversation_of(record):
            return answered_ids(self.tokenizer, messages, response)
        return [*encode(self.tokenizer, query + response, self.control), eos_ids(self.tokenizer)[0]]


def gold_columns(table: pd.DataFrame, **columns: str) -> dict[str, list[float]]:
    """Computes gold scores of columns of texts, if all records (JSON) of the table have hidden facts."""
    records = [json.loads(record) for record in table["record"]]
    if not all(isinstance(record.get("facts"), dict) for record in records):
        return {}
    queries = table["query"].tolist()
    return {new: gold_scores(queries, table[texts].tolist(), records) for new, texts in columns.items()}
