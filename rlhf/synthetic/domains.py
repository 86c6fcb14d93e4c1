"""The two domains of the embedded data: their facts, and the sentences that tell them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import yaml

Facts = dict[str, str]


@dataclass(frozen=True)
class Domain:
    """The facts that a post of one domain can have, and the sentences that tell them.

    Attributes:
        slots: fact name -> the values it can take; no value is part of another value of the same fact.
        required: facts that every demonstration states.
        title: templates of the title (empty for articles).
        tell: per fact or group of facts, in the order of the post, templates of the sentence that tells it.
        distractors: sentences that state no fact.
        summarise: functions that write a one-sentence summary, one per style.
    """

    slots: dict[str, list[str]]
    required: list[str]
    title: list[str]
    tell: dict[str, list[str]]
    distractors: list[str]
    summarise: tuple[Callable[[Facts], str], ...]


def _piece(facts: Facts, slot: str, template: str) -> str:
    return template.format(facts[slot]) if slot in facts else ""


def _reddit_plain(f: Facts) -> str:
    who = f"My {f['relation']}" if "relation" in f else "Someone"
    return (
        who + _piece(f, "name", " {}") + " " + f.get("event", "upset me") + _piece(f, "place", " {}")
        + _piece(f, "time", " {}") + _piece(f, "amount", " and I lost {} dollars")
        + _piece(f, "ask", ", I need to know {}") + "."
    )  # fmt: skip


def _reddit_time_first(f: Facts) -> str:
    who = f"my {f['relation']}" if "relation" in f else "someone"
    text = (
        _piece(f, "time", "{} ") + who + _piece(f, "name", " {}") + " " + f.get("event", "upset me")
        + _piece(f, "place", " {}") + _piece(f, "amount", " and I lost {} dollars")
        + _piece(f, "ask", ", I need to know {}") + "."
    )  # fmt: skip
    return text[0].upper() + text[1:]


def _news_plain(f: Facts) -> str:
    return (
        "The " + f.get("body", "authorities") + " " + f.get("action", "took a decision") + _piece(f, "city", " in {}")
        + _piece(f, "day", " {}") + _piece(f, "cost", " for {} million dollars") + _piece(f, "reason", " {}") + "."
    )  # fmt: skip


def _load(name: str, *summarise: Callable[[Facts], str]) -> Domain:
    texts = yaml.safe_load(files(__package__).joinpath("domains.yaml").read_text())[name]
    return Domain(**texts, summarise=summarise)


REDDIT = _load("reddit", _reddit_plain, _reddit_time_first)
NEWS = _load("news", _news_plain)
ALL_SLOTS = REDDIT.slots | NEWS.slots  # the domains share no fact
