"""The two domains of the embedded data: their facts, and the sentences that tell them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

    slots: dict[str, tuple[str, ...]]
    required: frozenset[str]
    title: tuple[str, ...]
    tell: dict[str, tuple[str, ...]]
    distractors: tuple[str, ...]
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


REDDIT = Domain(
    slots={
        "relation": (
            "sister", "brother", "boss", "roommate", "neighbor", "cousin", "uncle", "aunt", "girlfriend", "boyfriend",
            "teacher", "landlord", "coworker", "mother", "father", "friend",
        ),
        "name": (
            "Alex", "Avery", "Casey", "Drew", "Jamie", "Jordan", "Jules", "Kim", "Lee", "Morgan", "Pat", "Quinn", "Riley",
            "Robin", "Sam", "Taylor",
        ),
        "event": (
            "sold my bike", "broke my laptop", "lost my keys", "borrowed my car", "forgot my birthday", "read my diary",
            "ate my lunch", "lied to me", "yelled at me", "moved my stuff", "burned my dinner", "took my phone",
            "hit my fence", "ruined my shirt", "scared my dog", "missed my wedding",
        ),
        "place": (
            "in Boston", "in Texas", "in Paris", "in London", "at school", "at work", "at home", "at the gym",
            "at the beach", "at the airport", "at the mall", "at a party", "at a bar", "at the park", "at church",
            "at the hotel",
        ),
        "time": (
            "yesterday", "last night", "last week", "last month", "on Monday", "on Tuesday", "on Friday", "on Sunday",
            "this morning", "in March", "in June", "in August",
        ),
        "amount": (
            "20", "30", "40", "50", "60", "70", "80", "90", "100", "200", "300", "400", "500", "600", "700", "800",
        ),
        "ask": (
            "how to stay calm", "how to say no", "how to move on", "how to forgive", "how to get even",
            "how to fix this", "what to say", "what to do next", "who is right", "if I should leave",
            "if I should sue", "if I should pay", "if this is normal", "if I am wrong", "when to talk", "why it hurts",
        ),
    },
    required=frozenset({"relation", "event", "ask"}),
    title=("My {relation} {event}", "Trouble with my {relation}", "I am upset with my {relation}"),
    tell={
        "who": (
            "My {relation} {name} {event}.", "So my {relation} {name} {event}.",
            "I have a {relation} called {name} and this person {event}.",
        ),
        "where": ("It was {place}.", "It all happened {place}.", "We were {place}."),
        "when": ("That was {time}.", "It started {time}."),
        "amount": ("I lost {amount} dollars.", "It cost me {amount} dollars.", "I had to pay {amount} dollars."),
        "ask": ("Please tell me {ask}.", "I want to know {ask}.", "Can you tell me {ask}?"),
    },
    distractors=(
        "I did not sleep well.", "We used to get along.", "My cat is fine.", "The weather was bad.",
        "Nobody else saw it.", "I like to cook.", "This is my first post.", "Sorry for the bad English.",
        "I was very tired.", "We have a long history.", "It is a small town.", "I work a lot.",
    ),
    summarise=(_reddit_plain, _reddit_time_first),
)  # fmt: skip

NEWS = Domain(
    slots={
        "body": ("city council", "school board", "mayor", "state senate", "hospital", "university", "police", "museum"),
        "action": (
            "approved a bridge", "closed a library", "opened a clinic", "sued a bank", "bought a farm",
            "planned a stadium", "fixed a dam", "hired a builder",
        ),
        "city": ("Denver", "Seattle", "Chicago", "Miami", "Dallas", "Phoenix", "Atlanta", "Detroit"),
        "day": ("on Monday", "on Tuesday", "on Friday", "on Sunday"),
        "cost": ("2", "3", "5", "7", "9", "12", "15", "18"),
        "reason": (
            "to save money", "to create jobs", "to please voters", "to help children", "to cut traffic", "to end a strike",
        ),
    },
    required=frozenset({"body", "action"}),
    title=(),
    tell={
        "what": ("The {body} {action}.", "It is official: the {body} {action}."),
        "where": ("The news came from {city}.", "Reporters gathered in {city}."),
        "when": ("The vote took place {day}.", "It was announced {day}."),
        "cost": ("The price is {cost} million dollars.", "It will cost {cost} million dollars."),
        "why": ("Officials said they want {reason}.", "The goal is {reason}."),
    },
    distractors=(
        "Critics were not convinced.", "Many people watched.", "A spokesman did not comment.", "It rained all day.",
        "More details are expected.", "The hall was full.",
    ),
    summarise=(_news_plain,),
)  # fmt: skip

ALL_SLOTS = REDDIT.slots | NEWS.slots  # the domains share no fact
