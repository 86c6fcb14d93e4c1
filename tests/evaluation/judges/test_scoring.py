"""Judges that look at each text alone: a reward model, and the gold score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.evaluation.judges import Answers, GoldJudge, Pair, RewardJudge, ScoringJudge
from rlhf.evaluation.reward_scorer import RewardScorer
from rlhf.synthetic.domains import REDDIT
from rlhf.synthetic.gold_score import gold_score
from rlhf.synthetic.posts import demonstrations

PAIRS = [Pair(f"query {n}", f" one {n}", f" another text {n * n}", {}) for n in range(9)]


def test_the_higher_reward_wins(reward_path: str, tmp_path: Path) -> None:
    judge = RewardJudge(reward_path, batch_size=4)
    judge.prepare(tmp_path / "none")
    answers = judge.prefer(PAIRS)
    scorer = RewardScorer(reward_path)
    for pair, answer in zip(PAIRS, answers, strict=True):
        ours, theirs = scorer([pair.query] * 2, [pair.a, pair.b])
        assert answer == Answers(*("ab"[theirs > ours] * 2))
    assert {answer.a_first for answer in answers} == {"a", "b"}
    assert not (tmp_path / "none").exists()


def test_the_higher_gold_score_wins() -> None:
    records = list(demonstrations(3, 1, "v"))
    empty = "nothing at all"
    pairs = [Pair("q", record["summary"], empty, record) for record in records]
    pairs += [Pair("q", empty, record["summary"], record) for record in records]
    pairs += [Pair("q", "one thing", "another", record) for record in records]
    assert all(gold_score(r["summary"], r["facts"], REDDIT.slots).score > 0 for r in records)
    assert GoldJudge().prefer(pairs) == [Answers(*[who] * 2) for who in ("a", "b", "tie") for _ in range(3)]


def test_gold_needs_facts() -> None:
    with pytest.raises(UserError, match="9 of 9 records have no hidden facts"):
        GoldJudge().prefer(PAIRS)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, float("nan")], "Own returned nan instead of a number for row 2 of 2 .*, whose response is ' one 1'"),
        ([None, 1.0], "Own returned None instead of a number for row 1 of 2"),
        ([1.0], "Own returned 1 rewards for 2 responses"),
        (7, "Own returned 7 instead of one number for each of 2 responses"),
    ],
)
def test_a_judge_of_ones_own_must_give_numbers(returned: Any, said: str) -> None:
    class Own(ScoringJudge):
        def scores(self, queries: Any, responses: Any, records: Any) -> Any:
            return returned

    with pytest.raises(UserError, match=f"judge: {said}"):
        Own().prefer(PAIRS[:2])


def test_settings_are_the_contents_of_the_model(reward_path: str, model_path: str) -> None:
    assert RewardJudge(reward_path, 4).settings() == RewardJudge(reward_path + "/", 8).settings()
    assert GoldJudge().settings() == {"class": "rlhf.evaluation.judges.scoring.GoldJudge"}
    with pytest.raises(UserError, match="not a reward model"):
        RewardJudge(model_path).prepare(Path("none"))
