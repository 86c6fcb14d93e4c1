"""Embedded data: posts told from hidden facts, demonstrations, labelled comparisons. No download, any size, seeded.

A post is written from hidden *facts* (who, what happened, where, when, how much, what is asked) among distracting
sentences. A demonstration is one sentence; like the authors of real TL;DRs, its writer always says what happened and
what is asked and leaves out each other fact more often than not. Comparisons pair summaries of named policies of
different quality; their label follows the gold score (`gold_score.py`) with the noise of a Bradley-Terry labeller.

Two domains: `REDDIT` has the schema of the TL;DR records, `NEWS` stands in for CNN/DM (out of distribution).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf.synthetic.domains import NEWS, REDDIT, Domain, Facts
from rlhf.synthetic.gold_score import gold_score

KEEP = 0.45  # how often a demonstration states a fact that is not required
SUBREDDITS = ("relationships", "advice", "family", "personal", "college", "work")


# --------------------------------------------------------------------------------------------- posts


def draw_facts(domain: Domain, rng: random.Random) -> Facts:
    """One value for every fact of the domain."""
    return {slot: rng.choice(values) for slot, values in domain.slots.items()}


def write_post(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """The post: every fact once, two to four distractors at random places between the sentences."""
    sentences = [rng.choice(domain.tell[group]).format(**facts) for group in domain.order]
    for distractor in rng.sample(domain.distractors, rng.randint(2, 4)):
        sentences.insert(rng.randint(0, len(sentences)), distractor)
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------- summaries


def _summary(domain: Domain, facts: Facts, rng: random.Random) -> str:
    return rng.choice(domain.summarise)(facts)


def _keep(domain: Domain, facts: Facts, probability: float, rng: random.Random) -> Facts:
    return {s: v for s, v in facts.items() if s in domain.required or rng.random() < probability}


def reference(domain: Domain, facts: Facts, post: str, rng: random.Random) -> str:
    """What the author of the post writes: each fact that is not required with probability `KEEP`."""
    return _summary(domain, _keep(domain, facts, KEEP, rng), rng)


def complete(domain: Domain, facts: Facts, post: str, rng: random.Random) -> str:
    """A careful writer: every fact."""
    return _summary(domain, facts, rng)


def fact_dropped(domain: Domain, facts: Facts, post: str, rng: random.Random) -> str:
    """Any two to four facts are missing, required ones too."""
    dropped = rng.sample(sorted(facts), rng.randint(2, 4))
    return _summary(domain, {s: v for s, v in facts.items() if s not in dropped}, rng)


def fact_invented(domain: Domain, facts: Facts, post: str, rng: random.Random) -> str:
    """Every fact, but two to four of them are wrong."""
    told = dict(facts)
    for slot in rng.sample(sorted(told), rng.randint(2, 4)):
        told[slot] = rng.choice([v for v in domain.slots[slot] if v != facts[slot]])
    return _summary(domain, told, rng)


def rambling(domain: Domain, facts: Facts, post: str, rng: random.Random) -> str:
    """The reference, followed by two to four sentences that nobody needs."""
    extra = rng.sample(domain.distractors, rng.randint(2, 4))
    return " ".join([reference(domain, facts, post, rng), *extra])


def off_topic(domain: Domain, facts: Facts, post: str, rng: random.Random) -> str:
    """The reference of another post."""
    return reference(domain, draw_facts(domain, rng), post, rng)


def cut_off(domain: Domain, facts: Facts, post: str, rng: random.Random) -> str:
    """The first 30 to 70 percent of the words of a reference."""
    words = reference(domain, facts, post, rng).split()
    return " ".join(words[: max(2, round(len(words) * rng.uniform(0.3, 0.7)))])


POLICIES: dict[str, Callable[[Domain, Facts, str, random.Random], str]] = {
    "reference": reference,
    "complete": complete,
    "fact_dropped": fact_dropped,
    "fact_invented": fact_invented,
    "rambling": rambling,
    "off_topic": off_topic,
    "cut_off": cut_off,
}


# ------------------------------------------------------------------------------------------- records


def _rng(seed: int, kind: str, index: int) -> random.Random:
    return random.Random(f"{seed}/{kind}/{index}")


def demonstrations(n: int, seed: int, split: str, writers: Sequence[str] = ("reference",)) -> Iterator[dict[str, Any]]:
    """TL;DR records `id, subreddit, title, post, summary`, and the hidden `facts`.

    Args:
        n: how many.
        seed: of everything; splits of equal seed share no post.
        split: stands in the id.
        writers: policies that write the summaries, each as often as the others.
    """
    for index in range(n):
        rng = _rng(seed, split, index)
        facts = draw_facts(REDDIT, rng)
        post = write_post(REDDIT, facts, rng)
        yield {
            "id": f"{split}-{seed}-{index}",
            "subreddit": rng.choice(SUBREDDITS),
            "title": rng.choice(REDDIT.title).format(**facts),
            "post": post,
            "summary": POLICIES[rng.choice(writers)](REDDIT, facts, post, rng),
            "facts": facts,
        }


def pretraining(n: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """What a base model has read: posts with true TL;DRs, by careful and by careless writers."""
    return demonstrations(n, seed, split, ("complete", "complete", "reference"))


def _label(margin: float, noise: float, rng: random.Random) -> tuple[int, int]:
    """The choice of a Bradley-Terry labeller, and a confidence from 1 to 9 that grows with the margin."""
    probability = (1 + math.tanh(margin / (2 * noise))) / 2 if noise > 0 else float(margin > 0)
    choice = 0 if rng.random() < probability else 1
    confidence = round(1 + abs(margin) + rng.gauss(0, 1))
    return choice, min(9, max(1, confidence))


def comparisons(
    n: int, seed: int, split: str, noise: float = 1.0, domain: Domain = REDDIT, batch: str = "batch0"
) -> Iterator[dict[str, Any]]:
    """Comparisons in OpenAI's format, and the hidden `facts`.

    Args:
        n: number of pairs.
        seed: of everything.
        split: stands in the record; splits of equal seed share no post.
        noise: temperature of the labeller in units of the gold score; 0 gives clean labels.
        domain: `REDDIT` or `NEWS` (whose `info` holds an `article` instead of a post).
        batch: prefix of the name of the batch; names of CNN/DM batches contain `cnndm`.
    """
    index = written = 0
    while written < n:
        rng = _rng(seed, f"comparison/{split}/{batch}", index)
        index += 1
        facts = draw_facts(domain, rng)
        post = write_post(domain, facts, rng)
        names = rng.sample(sorted(POLICIES), 2)
        texts = [POLICIES[name](domain, facts, post, rng) for name in names]
        scores = [gold_score(text, facts, domain.slots).score for text in texts]
        if texts[0] == texts[1] or scores[0] == scores[1]:
            continue
        choice, confidence = _label(scores[0] - scores[1], noise, rng)
        is_news = domain is NEWS
        yield {
            "info": {
                "id": f"{split}-{batch}-{seed}-{index}",
                "post": None if is_news else post,
                "title": None if is_news else rng.choice(domain.title).format(**facts),
                "subreddit": None if is_news else rng.choice(SUBREDDITS),
                "site": None,
                "article": post if is_news else None,
            },
            "summaries": [{"text": t, "policy": p, "note": None} for t, p in zip(texts, names, strict=True)],
            "choice": choice,
            "worker": None,
            "batch": f"{batch}_{written % 3}",
            "split": split,
            "extra": {"confidence": confidence},
            "facts": facts,
        }
        written += 1
