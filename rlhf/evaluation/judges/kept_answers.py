"""Judges that are asked a question per order, whose answers are kept in a file."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf.errors import UserError
from rlhf.evaluation.judges.interface import Answers, Judge, Pair, Winner

Verdict = Literal["first", "second", "tie", "invalid"]

_RUBBISH = 20  # so many questions without one readable answer, and the judge is given up


class Question(NamedTuple):
    """Which is better, the first or the second response? `key` says where its answers are kept."""

    key: str
    query: str
    first: str
    second: str


@dataclass(frozen=True)
class Entry:
    """One answer in the file.

    Attributes:
        verdict: what it says; None where it could not be read.
        text: the answer, as it came.
        prompt_tokens, completion_tokens: as the endpoint counted them.
    """

    verdict: Verdict | None
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class AnswerFile:
    """Answers in a file of JSON lines; each is on disk before the next one is asked for.

    A last line that a killed run left unfinished is passed over. Several tables, and several runs at a time, may share
    a file.

    Args:
        file: the file; its folder must be there.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._entries: dict[str, list[Entry]] = {}
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
            try:
                known = json.loads(line)
                self._entries.setdefault(known.pop("key"), []).append(Entry(**known))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # torn

    def of(self, key: str) -> list[Entry]:
        """The answers to a question, in the order in which they came."""
        return self._entries.get(key, [])

    def append(self, key: str, entry: Entry) -> None:
        """Keep an answer. Any thread may."""
        line = json.dumps({"key": key, **vars(entry)}) + "\n"
        with self._lock:
            with self.file.open("ab+") as stream:
                if stream.tell() and _last_byte(stream) != b"\n":
                    line = "\n" + line  # ends a torn line
                stream.write(line.encode())
            self._entries.setdefault(key, []).append(entry)


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, 2)
    return stream.read(1)


class AskingJudge(Judge):
    """A judge that is asked about each pair twice, once per order, and whose answers are kept.

    `attempts` answers that can't be read make a question invalid.
    """

    attempts: int = 1
    _answers: AnswerFile
    _problem: str = ""  # what went wrong last, where that was no answer

    def prepare(self, answers: Path) -> None:
        """Read the answers that are there.

        Raises:
            UserError: the file can't be written; that must not come out when the first answer is paid for.
        """
        try:
            answers.parent.mkdir(parents=True, exist_ok=True)
            answers.open("ab").close()
        except OSError as error:
            raise UserError(f"answers: the file {answers} can't be written: {error.strerror}.") from error
        self._answers = AnswerFile(answers)
        self._asked: list[Question] = []
        self._known: dict[str, int] = {}

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Verdict], None, None]:
        """Ask, keep every answer with `self._answers.append`, and yield verdicts as they come, in any order."""

    def prefer(self, pairs: Sequence[Pair]) -> list[Answers]:
        """Ask what is not yet answered, in both orders.

        Raises:
            UserError: not one of the first questions got an answer that can be read.
        """
        from rich.progress import track

        settings = self.settings()
        both = [(_question(settings, p.query, p.a, p.b), _question(settings, p.query, p.b, p.a)) for p in pairs]
        self._asked = list({question.key: question for pair in both for question in pair}.values())
        self._known = {question.key: len(self._answers.of(question.key)) for question in self._asked}
        verdicts = {q.key: verdict for q in self._asked if (verdict := self.verdict(q)) is not None}
        self._give_up(verdicts)
        left = [question for question in self._asked if question.key not in verdicts]
        count, done = len(self._asked), len(verdicts)
        with closing(self.ask(left)) as answers:  # an error here must stop what goes on behind it
            for question, verdict in track(answers, f"Asking {self.name}", count, done, transient=True) if left else ():
                verdicts[question.key] = verdict
                self._give_up(verdicts)
        return [
            Answers(_winner(verdicts[one.key], "a", "b"), _winner(verdicts[two.key], "b", "a")) for one, two in both
        ]

    def verdict(self, question: Question) -> Verdict | None:
        """What the kept answers say; None where it must be asked (again)."""
        entries = self._answers.of(question.key)
        readable = [entry.verdict for entry in entries if entry.verdict is not None]
        if readable:
            return readable[0]
        return "invalid" if len(entries) >= self.attempts else None

    def usage(self) -> dict[str, float]:
        """Answers and tokens, of the whole table and of this run."""
        whole = [entry for q in self._asked for entry in self._answers.of(q.key)]
        now = [entry for q in self._asked for entry in self._answers.of(q.key)[self._known[q.key] :]]
        return {
            f"{name}{suffix}": value
            for suffix, entries in (("", whole), ("_now", now))
            for name, value in (
                ("answers", len(entries)),
                ("prompt_tokens", sum(entry.prompt_tokens for entry in entries)),
                ("completion_tokens", sum(entry.completion_tokens for entry in entries)),
            )
        }

    def _give_up(self, verdicts: dict[str, Verdict]) -> None:
        """Stop, where nothing that can be read has come so far."""
        if len(verdicts) < min(_RUBBISH, len(self._asked)) or set(verdicts.values()) != {"invalid"}:
            return
        texts = [entry.text for key in verdicts for entry in self._answers.of(key)]
        last = self._problem or repr(texts[-1][-200:])
        raise UserError(
            f"judge: not one of {len(verdicts)} questions got an answer that can be read; the last one: {last}. Choose "
            f"another model or template; the answers are in {self._answers.file}, delete it to ask the same again."
        )


def _question(settings: dict[str, Any], query: str, first: str, second: str) -> Question:
    content = json.dumps([settings, query, first, second], sort_keys=True)
    return Question(hashlib.sha256(content.encode()).hexdigest(), query, first, second)


def _winner(verdict: Verdict, first: Winner, second: Winner) -> Winner:
    """Which candidate a verdict means, by who stood where."""
    return {"first": first, "second": second, "tie": "tie", "invalid": "invalid"}[verdict]
