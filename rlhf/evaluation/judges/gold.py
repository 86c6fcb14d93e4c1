"""The gold score of the embedded data as a judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.errors import UserError
from rlhf.evaluation.judges.interface import ScoringJudge
from rlhf.synthetic.gold_score import gold_scores


class GoldJudge(ScoringJudge):
    """Prefers the higher gold score: facts of the post covered, minus facts invented, minus excess words.

    Works on embedded data only, whose records have the hidden facts.
    """

    def scores(self, queries: list[str], responses: list[str], records: list[Mapping[str, Any]]) -> list[float]:
        """The gold score of each response."""
        bare = sum(not isinstance(record.get("facts"), dict) for record in records)
        if bare:
            raise UserError(
                f"judge: {bare} of {len(records)} records have no hidden facts; GoldJudge works on embedded data only."
            )
        return gold_scores(queries, responses, [dict(record) for record in records])
