"""Numbers for responses: the reward of a reward model, the gold score of the embedded data."""

import json
from collections.abc import Sequence

import pandas as pd
import torch

from rlhf.hardware import best_device
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import encode, eos_ids, load_tokenizer
from rlhf.ops.sequences import pad_sequences
from rlhf.synthetic.gold_score import gold_scores


class RewardScorer:
    """A reward model that reads texts, `batch_size` at a time."""

    def __init__(self, path: str, setting: str = "reward", batch_size: int = 64) -> None:
        self.tokenizer = load_tokenizer(path, setting=setting)
        self.device = best_device()
        self.model = ScalarModel.from_pretrained(path, setting).to(self.device).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Computes the reward of each response, ended with EOS, to its query."""
        texts = [q + r for q, r in zip(queries, responses, strict=True)]
        sequences = [[*encode(self.tokenizer, text), eos_ids(self.tokenizer)[0]] for text in texts]
        scores: list[float] = []
        for start in range(0, len(sequences), self.batch_size):
            ids, mask = pad_sequences(sequences[start : start + self.batch_size], self.tokenizer.pad_token_id)
            scores += self.model.score(ids.to(self.device), mask.to(self.device)).tolist()
        return scores


def gold_columns(table: pd.DataFrame, **columns: str) -> dict[str, list[float]]:
    """Computes gold scores of columns of texts, if all records (JSON) of the table have hidden facts."""
    records = [json.loads(record) for record in table["record"]]
    if not all(isinstance(record.get("facts"), dict) for record in records):
        return {}
    queries = table["query"].tolist()
    return {new: gold_scores(queries, table[texts].tolist(), records) for new, texts in columns.items()}
