"""Embedded data: reproducible, splits apart, posts that tell their facts, policies of different quality."""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

import pytest

from rlhf.synthetic.domains import NEWS, REDDIT, Domain
from rlhf.synthetic.gold_score import gold_score
from rlhf.synthetic.posts import POLICIES, comparisons, demonstrations, draw_facts, pretraining, write_post

DOMAINS = pytest.mark.parametrize("domain", [REDDIT, NEWS], ids=["reddit", "news"])


def pairs_of(domain: Domain, n: int, noise: float, seed: int = 1) -> list[dict[str, Any]]:
    return list(comparisons(n, seed, "validation", noise, domain, "cnndm" if domain is NEWS else "batch0"))


def gold_margin(pair: dict[str, Any], domain: Domain) -> float:
    """How much better the chosen summary is than the other."""
    scores = [gold_score(s["text"], pair["facts"], domain.slots).score for s in pair["summaries"]]
    return scores[pair["choice"]] - scores[1 - pair["choice"]]


def gold_by_policy(domain: Domain) -> dict[str, float]:
    scores: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in range(300):
        facts = draw_facts(domain, random.Random(seed))
        for name, policy in POLICIES.items():
            summary = policy(domain, facts, random.Random(1000 + seed))
            scores[name].append(gold_score(summary, facts, domain.slots).score)
    return {name: mean(values) for name, values in scores.items()}


def test_the_seed_and_nothing_else_decides() -> None:
    def everything(seed: int) -> list[Any]:
        makers = [demonstrations(9, seed, "train"), pretraining(9, seed, "p"), comparisons(9, seed, "train", 1.0)]
        return [list(records) for records in makers]

    random.seed(5)
    first = everything(1)
    random.seed(6)
    assert everything(1) == first
    assert all(a != b for a, b in zip(everything(2), first, strict=True))


def test_more_records_begin_with_the_fewer() -> None:
    assert list(demonstrations(9, 1, "train"))[:4] == list(demonstrations(4, 1, "train"))
    assert list(comparisons(9, 1, "train"))[:4] == list(comparisons(4, 1, "train"))


def test_no_post_stands_in_two_splits() -> None:
    splits = {
        "train": [d["post"] for d in demonstrations(400, 1, "train")],
        "validation": [d["post"] for d in demonstrations(400, 1, "validation")],
        "pretraining": [d["post"] for d in pretraining(400, 1, "pretraining")],
        "pairs": [p["info"]["post"] for p in comparisons(300, 1, "train")],
        "pairs_validation": [p["info"]["post"] for p in comparisons(300, 1, "validation")],
    }
    posts = [post for split in splits.values() for post in split]
    assert len(set(posts)) == len(posts)
    ids = [d["id"] for split in ("train", "validation") for d in demonstrations(50, 1, split)]
    assert len(set(ids)) == 100


@DOMAINS
def test_a_post_tells_every_fact_once_and_no_other(domain: Domain) -> None:
    for seed in range(200):
        facts = draw_facts(domain, random.Random(seed))
        assert facts.keys() == domain.slots.keys()
        post = write_post(domain, facts, random.Random(seed))
        assert all(post.count(value) >= 1 for value in facts.values())
        assert gold_score(post, facts, domain.slots)[:2] == (len(facts), 0)


def test_demonstrations_have_the_tldr_schema_and_tell_the_truth() -> None:
    told = []
    for record in demonstrations(300, 1, "train"):
        assert list(record) == ["id", "subreddit", "title", "post", "summary", "facts"]
        assert all(record["facts"][slot] in record["post"] for slot in record["facts"])
        gold = gold_score(record["summary"], record["facts"], REDDIT.slots)
        assert gold.invented == 0
        assert all(record["facts"][slot].lower() in record["summary"].lower() for slot in REDDIT.required)
        assert record["summary"] == record["summary"].strip()
        told.append(gold.covered)
    assert min(told) == 3
    assert mean(told) == pytest.approx(3 + 4 * 0.45, abs=0.25)


@DOMAINS
def test_complete_is_the_best_policy_and_off_topic_the_worst(domain: Domain) -> None:
    scores = gold_by_policy(domain)
    assert scores["complete"] == len(domain.slots)
    assert max(scores, key=scores.__getitem__) == "complete"
    assert min(scores, key=scores.__getitem__) == "off_topic"
    assert scores["reference"] > scores["cut_off"]
    assert scores["complete"] - scores["fact_invented"] == pytest.approx(6, abs=0.5)  # 3 facts lost and 3 invented


def test_dropped_facts_and_needless_sentences_make_a_summary_worse() -> None:
    scores = gold_by_policy(REDDIT)
    assert scores["reference"] > max(scores["fact_dropped"], scores["rambling"])


@DOMAINS
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_writes_for_any_facts(name: str, domain: Domain) -> None:
    for seed in range(300):
        facts = draw_facts(domain, random.Random(seed))
        assert POLICIES[name](domain, dict(facts), random.Random(1000 + seed)).strip()


@DOMAINS
def test_comparisons_have_exactly_the_columns_of_openai(domain: Domain) -> None:
    for pair in pairs_of(domain, 20, 1.0):
        assert set(pair) - {"facts"} == {"info", "summaries", "choice", "worker", "batch", "split", "extra"}
        assert set(pair["info"]) == {"id", "post", "title", "subreddit", "site", "article"}
        assert [set(s) for s in pair["summaries"]] == [{"text", "policy", "note"}] * 2
        assert set(pair["extra"]) == {"confidence"}


@DOMAINS
def test_comparisons_hold_what_their_columns_say(domain: Domain) -> None:
    pairs = pairs_of(domain, 60, 1.0)
    assert len(pairs) == 60
    for pair in pairs:
        texts = [s["text"] for s in pair["summaries"]]
        assert texts[0] != texts[1]
        assert {s["policy"] for s in pair["summaries"]} <= POLICIES.keys()
        assert pair["choice"] in (0, 1)
        assert pair["extra"]["confidence"] in range(1, 10)
        assert ("cnndm" in pair["batch"]) == (domain is NEWS)
        assert pair["split"] == "validation"
        empty = ["post", "title", "subreddit"] if domain is NEWS else ["article"]
        assert [k for k in ("post", "title", "subreddit", "article") if pair["info"][k] is None] == empty
    assert len({pair["info"]["id"] for pair in pairs}) == 60
    assert len({pair["batch"] for pair in pairs}) == 3
    assert {pair["choice"] for pair in pairs} == {0, 1}


@DOMAINS
@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_without_noise_the_label_always_agrees_with_gold(domain: Domain, noise: float) -> None:
    assert min(gold_margin(pair, domain) for pair in pairs_of(domain, 300, noise)) > 0


@DOMAINS
def test_noise_flips_close_pairs_more_often(domain: Domain) -> None:
    def agreement(noise: float) -> float:
        return mean(gold_margin(pair, domain) > 0 for pair in pairs_of(domain, 400, noise))

    assert 0.75 < agreement(1.0) < 0.99
    assert 0.45 < agreement(100.0) < 0.6


def test_confidence_grows_with_the_margin() -> None:
    pairs = pairs_of(REDDIT, 400, 0.0)
    close = [pair["extra"]["confidence"] for pair in pairs if gold_margin(pair, REDDIT) < 2]
    clear = [pair["extra"]["confidence"] for pair in pairs if gold_margin(pair, REDDIT) > 4]
    assert mean(clear) > mean(close) + 2
