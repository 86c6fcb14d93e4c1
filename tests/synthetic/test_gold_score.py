"""The gold score: covered facts, invented facts, words beyond 30."""

from __future__ import annotations

import pytest

from rlhf.synthetic.domains import NEWS, REDDIT, Domain
from rlhf.synthetic.gold_score import gold_score, gold_scores

FACTS = {"relation": "sister", "amount": "20", "place": "in Paris", "ask": "what to say"}
THIRTY = "My sister lost 20 in Paris so tell me what to say" + " please" * 18


@pytest.mark.parametrize(
    ("summary", "covered", "invented", "words", "score"),
    [
        ("", 0, 0, 0, 0.0),
        ("Nothing of it.", 0, 0, 3, 0.0),
        ("My sister lost 20 dollars in Paris, what to say?", 4, 0, 10, 4.0),
        ("MY SISTER LOST 20 DOLLARS IN PARIS.", 3, 0, 7, 3.0),
        ("My sister, my sister, my sister!", 1, 0, 6, 1.0),
        ("I lost 200 dollars.", 0, 1, 4, -1.0),
        ("I lost 20 or 30 dollars.", 1, 1, 6, 0.0),
        ("I lost 30, 40 or 50 dollars.", 0, 1, 7, -1.0),
        ("My brother was in Texas and lost 300.", 0, 3, 8, -3.0),
        ("My sisters and stepsister are in Parisian hats.", 0, 0, 8, 0.0),
        ("A sister-in-law has $20.", 2, 0, 4, 2.0),
        ("It cost 120 or 2000 or 20th.", 0, 0, 7, 0.0),
        (THIRTY, 4, 0, 30, 4.0),
        (THIRTY + " please", 4, 0, 31, 3.9),
        (THIRTY + " please" * 50, 4, 0, 80, -1.0),
    ],
)
def test_frozen_scores(summary: str, covered: int, invented: int, words: int, score: float) -> None:
    result = gold_score(summary, FACTS, REDDIT.slots)
    assert result[:3] == (covered, invented, words)
    assert result.score == pytest.approx(score)


@pytest.mark.parametrize("domain", [REDDIT, NEWS], ids=["reddit", "news"])
def test_no_value_is_mentioned_by_another_of_its_fact(domain: Domain) -> None:
    for slot, values in domain.slots.items():
        assert len(set(values)) == len(values)
        for value in values:
            for other in values:
                found = gold_score(other, {slot: value}, domain.slots)
                assert (found.covered, found.invented) == ((1, 0) if other == value else (0, 1))


@pytest.mark.parametrize("domain", [REDDIT, NEWS], ids=["reddit", "news"])
def test_distractors_mention_no_value(domain: Domain) -> None:
    text = " ".join(domain.distractors)
    values = [(slot, value) for slot, values in domain.slots.items() for value in values]
    assert not [(s, v) for s, v in values if gold_score(text, {s: v}, domain.slots).covered]


def test_the_domains_share_no_fact() -> None:
    assert not REDDIT.slots.keys() & NEWS.slots.keys()


def test_as_a_reward_function_it_ignores_the_facts_of_the_other_domain() -> None:
    records = [
        {"facts": {"relation": "boss", "amount": "50", "city": None}},
        {"facts": {"relation": None, "amount": None, "city": "Miami"}},
    ]
    assert gold_scores(["", ""], [" My boss lost 60.", " In Miami."], records) == [0.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        gold_scores([], ["one"], [])
