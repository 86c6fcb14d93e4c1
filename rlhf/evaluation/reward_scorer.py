"""Numbers for responses: the reward of a reward model, the gold score of the embedded data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.data.texts import encode
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.sequences import pad_sequences
from rlhf.synthetic.gold_score import gold_scores


def best_device() -> torch.device:
    """Returns the NVIDIA GPU of this process, or the CPU (on a Mac always the CPU)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class RewardScorer:
    """A reward model that reads texts.

    Args:
        path: export of a reward model.
        setting: how the user names it, for messages.
        batch_size: texts that go through the model at a time.
    """

    def __init__(self, path: str, setting: str = "reward", batch_size: int = 64) -> None:
        self.tokenizer = load_tokenizer(path, setting=setting)
        self.device = best_device()
        self.model = ScalarModel.from_pretrained(path, setting).to(self.device).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The reward of each response, ended with EOS, to its query."""
        texts = [q + r for q, r in zip(queries, responses, strict=True)]
        sequences = [[*encode(self.tokenizer, text), self.tokenizer.eos_token_id] for text in texts]
        scores: list[float] = []
        for start in range(0, len(sequences), self.batch_size):
            ids, mask = pad_sequences(sequences[start : start + self.batch_size], self.tokenizer.pad_token_id)
            scores += self.model.score(ids.to(self.device), mask.to(self.device)).tolist()
        return scores


def has_gold(records: Sequence[dict[str, Any]]) -> bool:
    """Whether all records have the hidden facts of the embedded data."""
    return all(isinstance(record.get("facts"), dict) for record in records)


def gold_columns(queries: list[str], records: list[dict[str, Any]], **texts: list[str]) -> dict[str, list[float]]:
    """A column of gold scores for each column of texts; none where the records have no hidden facts.

    Args:
        queries: of the texts.
        records: of the queries.
        texts: name of the new column -> what to score.
    """
    if not has_gold(records):
        return {}
    return {name: gold_scores(queries, responses, records) for name, responses in texts.items()}
