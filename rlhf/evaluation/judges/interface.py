"""The interface of all judges, which say which of two responses is better."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from rlhf.evaluation.reward_functions import as_numbers

Winner = Literal["a", "b", "tie", "invalid"]


@dataclass(frozen=True)
class Pair:
    """Two responses to a query.

    Attributes:
        query: the text that both answer.
        a, b: the responses of the two candidates; they differ, and neither is empty.
        record: the record of the query; empty if the tables have none.
    """

    query: str
    a: str
    b: str
    record: Mapping[str, Any]


class Answers(NamedTuple):
    """The candidate that a judge prefers when A comes first, and when B does."""

    a_first: Winner
    b_first: Winner


class Judge(ABC):
    """Says which response of a pair is better, asked in both orders.

    To write your own, subclass this (or `ScoringJudge`) and override `prefer`; the config names the class by its import
    path. Public attributes are its settings, and part of the settings of a judged table.
    """

    @property
    def name(self) -> str:
        """The name of this judge in tables and reports."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """Returns everything that the answers depend on, as JSON values."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **public}

    def check(self) -> None:  # noqa: B027  (most judges can do no more than to be made)
        """Refuses a model that cannot judge, long before the first pair; no weights are loaded."""

    def prepare(self, answers: Path) -> None:  # noqa: B027  (most judges have nothing to prepare)
        """Prepares the judge before the first pair, and refuses what would otherwise fail later.

        Answers that are expensive can be kept in the file `answers`, for the next run.
        """

    @abstractmethod
    def prefer(self, pairs: Sequence[Pair]) -> list[Answers]:
        """Returns the answers to pairs, in their order."""

    def usage(self) -> dict[str, float]:
        """Returns what the answers cost, as named numbers for the summary."""
        return {}


class ScoringJudge(Judge):
    """A judge that gives each text a number, so that the order does not matter; the higher one wins."""

    @abstractmethod
    def scores(self, queries: list[str], responses: list[str], records: list[Mapping[str, Any]]) -> list[float]:
        """Computes a number for each response to its query."""

    @override
    def prefer(self, pairs: Sequence[Pair]) -> list[Answers]:
        queries, records = [pair.query for pair in pairs], [pair.record for pair in pairs]
        ours, theirs = (
            as_numbers(self.scores(queries, texts, records), texts, f"judge: {self.name}")
            for texts in ([pair.a for pair in pairs], [pair.b for pair in pairs])
        )
        winners: list[Winner] = ["a" if x > y else "b" if x < y else "tie" for x, y in zip(ours, theirs, strict=True)]
        return [Answers(winner, winner) for winner in winners]
