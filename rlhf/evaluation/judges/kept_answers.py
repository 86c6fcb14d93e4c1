"""Judges that are asked about each pair in both orders, and keep the answers in a file."""

import hashlib
import json
import string
import threading
from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from typing_extensions import override

from rlhf.errors import UserError
from rlhf.evaluation.judges.interface import Answers, Judge, Pair, Winner

Verdict = Literal["first", "second", "tie", "invalid"]
_A_FIRST: dict[Verdict, Winner] = {"first": "a", "second": "b", "tie": "tie", "invalid": "invalid"}
_B_FIRST: dict[Verdict, Winner] = {"first": "b", "second": "a", "tie": "tie", "invalid": "invalid"}
_RUBBISH = 20  # after so many questions without one readable answer the judge is given up


class Question(NamedTuple):
    """The question which of two responses is better; `key` identifies its answers in the file."""

    key: str
    query: str
    first: str
    second: str


@dataclass(frozen=True)
class Entry:
    """One answer in the file, with its tokens as the endpoint counted them."""

    verdict: Verdict | None  # None if it could not be read
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class AnswerFile:
    """Answers in a file of JSON lines; each is on disk before the next question is asked.

    A last line that a killed run left unfinished is skipped. Several tables, and several runs at a time, may share a
    file.
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
        """Returns the answers to a question, the earliest first."""
        return self._entries.get(key, [])

    def append(self, key: str, entry: Entry) -> None:
        """Keeps an answer, from any thread."""
        line = json.dumps({"key": key, **vars(entry)}) + "\n"
        with self._lock:
            with self.file.open("ab+") as stream:
                stream.seek(max(0, stream.tell() - 1))
                if stream.read(1) not in (b"", b"\n"):
                    line = "\n" + line  # ends a torn line
                stream.write(line.encode())
            self._entries.setdefault(key, []).append(entry)


class AskingJudge(Judge):
    """Asks about each pair twice, once per order, and keeps the answers.

    After `attempts` answers that cannot be read, a question counts as invalid.
    """

    def __init__(self, template: str, attempts: int = 1) -> None:
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise UserError(f"judge.template is not a format string: {error}.") from error
        if fields != {"query", "first", "second"}:
            raise UserError("judge.template must have the fields {query}, {first} and {second}, and no others.")
        self.template = template
        self._attempts = attempts  # private, since it changes no answer
        self._problem = ""  # the last thing that went wrong without being an answer
        self._asked: list[Question] = []
        self._known: dict[str, int] = {}  # answers to each question before this run

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Verdict], None, None]:
        """Asks, keeps every answer with `self._answers.append`, and yields verdicts as they come, in any order."""

    def prompt(self, question: Question) -> str:
        """Returns the text of a question."""
        return self.template.format(query=question.query, first=question.first, second=question.second)

    @override
    def prepare(self, answers: Path) -> None:
        try:  # before the first answer is paid for
            answers.parent.mkdir(parents=True, exist_ok=True)
            answers.open("ab").close()
        except OSError as error:
            raise UserError(f"answers: the file {answers} cannot be written: {error.strerror}.") from error
        self._answers = AnswerFile(answers)

    @override
    def prefer(self, pairs: Sequence[Pair]) -> list[Answers]:
        from rich.progress import track

        settings = self.settings()
        both = [(_question(settings, p.query, p.a, p.b), _question(settings, p.query, p.b, p.a)) for p in pairs]
        self._asked = list({question.key: question for pair in both for question in pair}.values())
        self._known = {question.key: len(self._answers.of(question.key)) for question in self._asked}
        verdicts = {q.key: verdict for q in self._asked if (verdict := self.verdict(q)) is not None}
        self._give_up(verdicts)
        left = [question for question in self._asked if question.key not in verdicts]
        count, done = len(self._asked), len(verdicts)
        with closing(self.ask(left)) as answers:  # so that an error here stops the threads behind it
            for question, verdict in track(answers, f"Asking {self.name}", count, done, transient=True) if left else ():
                verdicts[question.key] = verdict
                self._give_up(verdicts)
        return [Answers(_A_FIRST[verdicts[one.key]], _B_FIRST[verdicts[two.key]]) for one, two in both]

    def verdict(self, question: Question) -> Verdict | None:
        """Returns the verdict of the kept answers; None if the question must be asked (again)."""
        entries = self._answers.of(question.key)
        otherwise: Verdict | None = "invalid" if len(entries) >= self._attempts else None
        return next((entry.verdict for entry in entries if entry.verdict is not None), otherwise)

    @override
    def usage(self) -> dict[str, float]:
        usage: dict[str, float] = {}
        for suffix, known in (("", {}), ("_now", self._known)):  # of the whole table, and of this run
            entries = [entry for q in self._asked for entry in self._answers.of(q.key)[known.get(q.key, 0) :]]
            usage[f"answers{suffix}"] = len(entries)
            usage[f"prompt_tokens{suffix}"] = sum(entry.prompt_tokens for entry in entries)
            usage[f"completion_tokens{suffix}"] = sum(entry.completion_tokens for entry in entries)
        return usage

    def _give_up(self, verdicts: dict[str, Verdict]) -> None:
        """Stops if the first questions have not got one answer that can be read."""
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
