"""Embedded data: posts written from hidden facts, demonstrations, labelled comparisons. No download, any size, seeded.

A demonstration is one sentence; like the authors of real TL;DRs, its writer always says what happened and what is asked
and leaves out each other fact more often than not. Comparisons pair summaries of named policies of different quality;
their label follows the gold score with the noise of a Bradley-Terry labeller.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf.synthetic.domains import REDDIT, Domain, Facts
from rlhf.synthetic.gold_score import gold_score

KEEP = 0.45  # how often a demonstration states a fact that is not required
SUBREDDITS = ("relationships", "advice", "family", "personal", "college", "work")


def draw_facts(domain: Domain, rng: random.Random) -> Facts:
    """Draws a value for every fact of the domain."""
    return {slot: rng.choice(values) for slot, values in domain.slots.items()}


def write_post(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """Writes a post that tells every fact once, with two to four distractors at random places."""
    sentences = [rng.choice(templates).format(**facts) for templates in domain.tell.values()]
    for distractor in rng.sample(domain.distractors, rng.randint(2, 4)):
        sentences.insert(rng.randint(0, len(sentences)), distractor)
    return " ".join(sentences)


def reference(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """Writes what an author would: the required facts, and each other fact with probability `KEEP`."""
    kept = {slot: value for slot, value in facts.items() if slot in domain.required or rng.random() < KEEP}
    return rng.choice(domain.summarise)(kept)


def complete(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """States every fact."""
    return rng.choice(domain.summarise)(facts)


def fact_dropped(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """Leaves out any two to four facts, required ones too."""
    dropped = rng.sample(sorted(facts), rng.randint(2, 4))
    return rng.choice(domain.summarise)({s: v for s, v in facts.items() if s not in dropped})


def fact_invented(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """States every fact, two to four of them wrong."""
    stated = dict(facts)
    for slot in rng.sample(sorted(stated), rng.randint(2, 4)):
        stated[slot] = rng.choice([v for v in domain.slots[slot] if v != facts[slot]])
    return rng.choice(domain.summarise)(stated)


def rambling(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """Adds two to four needless sentences to a reference."""
    extra = rng.sample(domain.distractors, rng.randint(2, 4))
    return " ".join([reference(domain, facts, rng), *extra])


def off_topic(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """Writes the reference of another post."""
    return reference(domain, draw_facts(domain, rng), rng)


def cut_off(domain: Domain, facts: Facts, rng: random.Random) -> str:
    """Keeps the first 30 to 70 percent of the words of a reference."""
    words = reference(domain, facts, rng).split()
    return " ".join(words[: max(2, round(len(words) * rng.uniform(0.3, 0.7)))])


_WRITERS = (reference, complete, fact_dropped, fact_invented, rambling, off_topic, cut_off)
POLICIES: dict[str, Callable[[Domain, Facts, random.Random], str]] = {writer.__name__: writer for writer in _WRITERS}


def demonstrations(n: int, seed: int, split: str, writers: Sequence[str] = ("reference",)) -> Iterator[dict[str, Any]]:
    """Generates TL;DR records `id, subreddit, title, post, summary`, with the hidden `facts`.

    Args:
        seed: seed of everything; splits with the same seed share no post.
        split: name of the split, part of the id.
        writers: policies that write the summaries, each as often as the others.
    """
    for index in range(n):
        rng = random.Random(f"{seed}/{split}/{index}")
        facts = draw_facts(REDDIT, rng)
        post = write_post(REDDIT, facts, rng)
        yield {
            "id": f"{split}-{seed}-{index}",
            "subreddit": rng.choice(SUBREDDITS),
            "title": rng.choice(REDDIT.title).format(**facts),
            "post": post,
            "summary": POLICIES[rng.choice(writers)](REDDIT, facts, rng),
            "facts": facts,
        }


def pretraining(n: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """Generates records for a base model to read: posts with true TL;DRs, by careful and by careless writers."""
    return demonstrations(n, seed, split, ("complete", "complete", "reference"))


def _label(margin: float, noise: float, rng: random.Random) -> tuple[int, int]:
    """Draws the choice of a Bradley-Terry labeller, and a confidence from 1 to 9 that grows with the margin."""
    probability = (1 + math.tanh(margin / (2 * noise))) / 2 if noise > 0 else float(margin > 0)
    choice = 0 if rng.random() < probability else 1
    confidence = round(1 + abs(margin) + rng.gauss(0, 1))
    return choice, min(9, max(1, confidence))


def comparisons(
    n: int, seed: int, split: str, noise: float = 1.0, domain: Domain = REDDIT, batch: str = "batch0"
) -> Iterator[dict[str, Any]]:
    """Generates comparisons in OpenAI's format, with the hidden `facts`.

    Args:
        seed: seed of everything; splits with the same seed share no post.
        split: name of the split, part of the record.
        noise: temperature of the labeller in units of the gold score; 0 gives clean labels.
        domain: `REDDIT`, or `NEWS` with an `article` in place of a post.
        batch: prefix of the name of the batch; names of CNN/DM batches contain `cnndm`.
    """
    index = written = 0
    while written < n:
        rng = random.Random(f"{seed}/comparison/{split}/{batch}/{index}")
        index += 1
        facts = draw_facts(domain, rng)
        post = write_post(domain, facts, rng)
        names = rng.sample(sorted(POLICIES), 2)
        texts = [POLICIES[name](domain, facts, rng) for name in names]
        scores = [gold_score(text, facts, domain.slots).score for text in texts]
        if texts[0] == texts[1] or scores[0] == scores[1]:
            continue
        choice, confidence = _label(scores[0] - scores[1], noise, rng)
        info: dict[str, str] = {"article": post}
        if domain is REDDIT:
            title = rng.choice(domain.title).format(**facts)
            info = {"post": post, "title": title, "subreddit": rng.choice(SUBREDDITS)}
        empty = dict.fromkeys(("post", "title", "subreddit", "site", "article"))
        yield {
            "info": {"id": f"{split}-{batch}-{seed}-{index}", **empty, **info},
            "summaries": [{"text": t, "policy": p, "note": None} for t, p in zip(texts, names, strict=True)],
            "choice": choice,
            "worker": None,
            "batch": f"{batch}_{written % 3}",
            "split": split,
            "extra": {"confidence": confidence},
            "facts": facts,
        }
        written += 1
