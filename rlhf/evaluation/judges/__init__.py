"""Judges: which of two responses to a query is better. One small interface, one file per judge."""

from rlhf.evaluation.judges.base import Answers, Judge, Pair, ScoringJudge
from rlhf.evaluation.judges.gold import GoldJudge
from rlhf.evaluation.judges.llm import OpenAIJudge
from rlhf.evaluation.judges.local import LocalJudge
from rlhf.evaluation.judges.reward import RewardJudge

__all__ = ["Answers", "GoldJudge", "Judge", "LocalJudge", "OpenAIJudge", "Pair", "RewardJudge", "ScoringJudge"]
