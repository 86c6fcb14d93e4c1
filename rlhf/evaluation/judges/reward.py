"""A reward model as a judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.checks import at_least
from rlhf.evaluation.judges.interface import ScoringJudge

if TYPE_CHECKING:
    from rlhf.evaluation.reward_scorer import RewardScorer


class RewardJudge(ScoringJudge):
    """Prefers the response with the higher reward, read at EOS.

    Args:
        model: export of a reward model.
        batch_size: texts that go through the model at a time.
    """

    def __init__(self, model: str, batch_size: int = 64) -> None:
        at_least("judge.batch_size", batch_size, 1)
        self._model, self._batch_size = model, batch_size
        self._scorer: RewardScorer | None = None

    def settings(self) -> dict[str, Any]:
        """The model, by its contents."""
        from rlhf.evaluation import fingerprints

        return {**super().settings(), "model": fingerprints.of_model(self._model, "judge.model")}

    def prepare(self, answers: Path) -> None:
        """Load the model."""
        from rlhf.evaluation.reward_scorer import RewardScorer

        self._scorer = RewardScorer(self._model, "judge.model", self._batch_size)

    def scores(self, queries: list[str], responses: list[str], records: list[Mapping[str, Any]]) -> list[float]:
        """The reward of each response."""
        from rich.progress import track

        assert self._scorer is not None, "prepare() comes first"
        scores: list[float] = []
        for start in track(range(0, len(queries), self._batch_size), f"Scoring with {self._model}", transient=True):
            part = slice(start, start + self._batch_size)
            scores += self._scorer(queries[part], responses[part])
        return scores
