"""Judges: which of two responses to a query is better. One small interface, one file per judge."""

from rlhf.evaluation.judges.endpoint import OpenAIJudge
from rlhf.evaluation.judges.gold import GoldJudge
from rlhf.evaluation.judges.interface import Answers, Judge, Pair, ScoringJudge
from rlhf.evaluation.judges.local_model import LocalJudge
from rlhf.evaluation.judges.reward import RewardJudge

__all__ = ["Answers", "GoldJudge", "Judge", "LocalJudge", "OpenAIJudge", "Pair", "RewardJudge", "ScoringJudge"]
