"""Judges, which say which of two responses to a query is better."""

from rlhf.evaluation.judges.endpoint import OpenAIJudge
from rlhf.evaluation.judges.interface import Answers, Judge, Pair, ScoringJudge
from rlhf.evaluation.judges.local_model import LocalJudge
from rlhf.evaluation.judges.scoring import GoldJudge, RewardJudge

__all__ = ["Answers", "GoldJudge", "Judge", "LocalJudge", "OpenAIJudge", "Pair", "RewardJudge", "ScoringJudge"]
