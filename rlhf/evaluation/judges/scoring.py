"""Judges that score each text alone: a reward model, and the gold score of the embedded data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from typing_extensions import override

from rlhf.errors import UserError
from rlhf.evaluation.judges.interface import ScoringJudge
from rlhf.evaluation.reward_functions import RewardFunction, call_reward_function, check_reward_functions, name_of
from rlhf.evaluation.reward_scorer import RewardScorer
from rlhf.hardware import Precision, weights_precision
from rlhf.models.classifiers import register_classifier
from rlhf.models.loading import check_reward_model, model_fingerprint
from rlhf.synthetic.gold_score import gold_scores


class GoldJudge(ScoringJudge):
    """Prefers the higher gold score: facts of the post covered, minus facts invented, minus excess words.

    Works on embedded data only, since other records have no hidden facts.
    """

    @override
    def scores(self, queries: list[str], responses: list[str], records: list[Mapping[str, Any]]) -> list[float]:
        if bare := sum(not isinstance(record.get("facts"), dict) for record in records):
            raise UserError(
                f"judge: {bare} of {len(records)} records have no hidden facts; GoldJudge works on embedded data only."
            )
        return gold_scores(queries, responses, records)


class FunctionJudge(ScoringJudge):
    """Prefers the response with the higher reward by a function.

    Args:
        function: a function as in `model.reward_function` of PPO.
    """

    def __init__(self, function: RewardFunction) -> None:
        check_reward_functions("judge.", function=function)
        self._function = function

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "function": name_of(self._function)}

    @override
    def scores(self, queries: list[str], responses: list[str], records: list[Mapping[str, Any]]) -> list[float]:
        texts = [
            {"query": query, "response": response, "record": dict(record)}
            for query, response, record in zip(queries, responses, records, strict=True)
        ]
        return call_reward_function(self._function, texts, torch.device("cpu"), "judge.function").tolist()


class RewardJudge(ScoringJudge):
    """Prefers the response with the higher reward, read at EOS.

    Args:
        model: export of a reward model.
        batch_size: texts that go through the model at a time.
        special_tokens: whether special tokens in the texts are `text` or `control` ids, as in `data.text`.
        precision: of the weights; `auto` is bfloat16 on GPUs and float32 on CPUs.
    """

    def __init__(
        self,
        model: str,
        batch_size: PositiveInt = 64,
        special_tokens: Literal["text", "control"] = "text",
        precision: Precision = "auto",
    ) -> None:
        self._model, self._batch_size = model, batch_size
        self.special_tokens, self.precision = special_tokens, weights_precision(precision)

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "model": model_fingerprint(self._model, "judge.model")}

    @override
    def check(self) -> None:
        register_classifier(check_reward_model(self._model, "judge.model"), "judge.model")

    @override
    def prepare(self, answers: Path) -> None:
        self._scorer = RewardScorer(
            self._model, "judge.model", self._batch_size, None, self.special_tokens == "control", self.precision
        )

    @override
    def scores(self, queries: list[str], responses: list[str], records: list[Mapping[str, Any]]) -> list[float]:
        from rich.progress import track

        scores: list[float] = []
        for start in track(range(0, len(queries), self._batch_size), f"Scoring with {self._model}", transient=True):
            part = slice(start, start + self._batch_size)
            scores += self._scorer(queries[part], responses[part], records[part])
        return scores
