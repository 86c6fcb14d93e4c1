"""Judges, which say which of two responses to a query is better."""

from rlhf.evaluation.judges.endpoint import OpenAIJudge
from rlhf.evaluation.judges.interface import Answers, Judge, Pair, ScoringJudge
from rlhf.evaluation.judges.local_model import LocalJudge
from rlhf.evaluation.judges.scoring import FunctionJudge, GoldJudge, RewardJudge

__all__ = [
    "Answers",
    "FunctionJudge",
    "GoldJudge",
    "Judge",
    "LocalJudge",
    "OpenAIJudge",
    "Pair",
    "RewardJudge",
    "ScoringJudge",
]
