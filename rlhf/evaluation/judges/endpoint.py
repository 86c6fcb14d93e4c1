"""A language model behind an OpenAI-compatible endpoint as a judge."""

from __future__ import annotations

import json
import os
import re
import string
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf.checks import above, at_least
from rlhf.errors import UserError
from rlhf.evaluation.judges.kept_answers import AskingJudge, Entry, Question, Verdict

if TYPE_CHECKING:
    from openai import OpenAI

TEMPLATE = """Below are a post and two summaries of it. Which summary is better? A good summary tells the points of \
the post that matter most, is true to the post, reads well, and leaves out what does not matter. How long a summary is \
does not count for or against it.

### Post
{query}

### Summary A
{first}

### Summary B
{second}

### Your answer
First compare the two summaries in one sentence. Then write one more line, the last one, which is exactly one of these \
three:
Preferred: A
Preferred: B
Preferred: tie"""
AGAIN = """An earlier answer to this could not be read. The last line of your answer must be exactly `Preferred: A`, \
`Preferred: B` or `Preferred: tie`, and nothing may follow it."""
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "tie": "tie"}
_LINE = re.compile(r"Preferred: (A|B|tie)")
_REFUSED = (400, 413, 422)  # this prompt is too long or against the rules, others may not be
_CONNECT = 5.0  # seconds
_PROBE = 10.0  # seconds


def read_verdict(answer: str) -> Verdict | None:
    """What an answer says: its last line must be `Preferred: A`, `Preferred: B` or `Preferred: tie`.

    Returns:
        None where it is not, or where an earlier such line says something else.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    labels = {match[1] for line in lines if (match := _LINE.fullmatch(line))}
    if len(labels) != 1 or not _LINE.fullmatch(lines[-1]):
        return None
    return _VERDICTS[labels.pop()]


def check_template(template: str) -> None:
    """Refuse a template without its three fields, or with others."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(f"judge.template is no format string: {error}.") from error
    if fields != {"query", "first", "second"}:
        raise UserError("judge.template must have the fields {query}, {first} and {second}, and no others.")


class OpenAIJudge(AskingJudge):
    """A language model behind an OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp and others.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint, for example http://localhost:8000/v1; by default OpenAI's.
        api_key_variable: the environment variable that holds the key; null for a server that needs none.
        template: the question, with `{query}`, `{first}` and `{second}`. It must ask for a last line that is
            `Preferred: A` (the first), `Preferred: B` or `Preferred: tie`.
        temperature: of the answers; null leaves it to the endpoint.
        max_tokens: longest answer; null leaves it to the endpoint.
        request: further fields of each request, for example `{max_completion_tokens: 500, reasoning_effort: low}`.
        concurrency: requests at a time.
        attempts: answers to a question that can't be read until it counts as invalid.
        timeout: seconds to wait for an answer.
        retries: how often a request is sent again after a rate limit, a timeout or an error of the server, waiting
            longer each time, or as long as the server says.
        prompt_price: of a million tokens of questions, to report the cost.
        completion_price: of a million tokens of answers.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_variable: str | None = "OPENAI_API_KEY",
        template: str = TEMPLATE,
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        request: dict[str, Any] | None = None,
        concurrency: int = 8,
        attempts: int = 3,
        timeout: float = 60.0,
        retries: int = 6,
        prompt_price: float | None = None,
        completion_price: float | None = None,
    ) -> None:
        check_template(template)
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            at_least(f"judge.{name}", value, 1)
        at_least("judge.retries", retries, 0)
        above("judge.timeout", timeout, 0)
        if (prompt_price is None) != (completion_price is None):
            raise UserError("judge.prompt_price and judge.completion_price: give both, or neither.")
        self._key = _read_key(api_key_variable)
        self._client = _client(self._key, base_url, timeout, retries)
        self.endpoint = _without_secrets(str(self._client.base_url))
        self.model, self.template, self.attempts = model, template, attempts
        self.request = _request_fields({"temperature": temperature, "max_tokens": max_tokens}, request or {})
        self._prices = prompt_price, completion_price
        self._concurrency = concurrency
        self._stop = threading.Event()
        self._error: UserError | None = None

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.model

    def settings(self) -> dict[str, Any]:
        """Endpoint, model, template and request; how often it may be asked does not change an answer."""
        return {name: value for name, value in super().settings().items() if name != "attempts"}

    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Verdict], None, None]:
        """Ask several questions at a time."""
        self._stop.clear()
        self._probe()
        pool = ThreadPoolExecutor(self._concurrency)
        futures = {pool.submit(self._decide, question): question for question in questions}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # what is on its way still comes into the file
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def usage(self) -> dict[str, float]:
        """Answers, tokens and, with prices, the cost: of the whole table and of this run."""
        usage = super().usage()
        prompt, completion = self._prices
        if prompt is None or completion is None:
            return usage
        costs = {
            f"cost{of}": (usage[f"prompt_tokens{of}"] * prompt + usage[f"completion_tokens{of}"] * completion) / 1e6
            for of in ("", "_now")
        }
        return usage | costs

    def _probe(self) -> None:
        """Find within seconds that the endpoint is down or refuses the key. It need not be able to list its models."""
        import openai

        try:
            self._client.with_options(max_retries=0, timeout=_timeout(_PROBE)).models.with_raw_response.list()
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._stopped(error) from None
        except openai.APIStatusError:
            pass

    def _decide(self, question: Question) -> Verdict:
        """Ask until an answer can be read, or `attempts` could not."""
        nothing = 0  # answers that were none at all: not kept, so that the next run asks again
        while (verdict := self.verdict(question)) is None:
            kept = len(self._answers.of(question.key))
            if self._stop.is_set():
                raise self._error or CancelledError
            if kept + nothing >= self.attempts:
                return "invalid"
            prompt = self.template.format(query=question.query, first=question.first, second=question.second)
            body = self._post(f"{prompt}\n\n{AGAIN}" if kept + nothing else prompt)
            if body is None:
                return "invalid"
            entry = self._entry(body)
            if entry is None:
                nothing += 1
                self._problem = f"a reply of another form: {self._cleaned(body)}"
            else:
                self._answers.append(question.key, entry)
        return verdict

    def _post(self, prompt: str) -> str | None:
        """What the endpoint replies to a prompt; None where it refuses this one.

        Raises:
            UserError: it refuses every one, or has gone.
        """
        import openai

        try:
            reply = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], extra_body=self.request
            )
            return reply.text
        except openai.OpenAIError as error:
            if getattr(error, "status_code", None) not in _REFUSED:
                raise self._stopped(error) from None
            self._problem = self._cleaned(str(error))
            return None

    def _entry(self, body: str) -> Entry | None:
        """The answer in a reply; None where it is not of the form of the protocol."""
        try:
            reply = json.loads(body)
            text = reply["choices"][0]["message"].get("content") or ""
            usage = reply.get("usage") or {}
            counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            return Entry(read_verdict(text), self._cleaned(text, None), *counts)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None

    def _stopped(self, error: Exception) -> UserError:
        """The sentence for an endpoint that gives no answers; nobody asks it any more."""
        kept = sum(bool(self._answers.of(question.key)) for question in self._asked)
        self._error = UserError(
            f"judge: no answer from the endpoint {self.endpoint}: {self._cleaned(str(error))} "
            f"({type(error).__name__}). {kept} of {len(self._asked)} questions are answered, the answers are in "
            f"{self._answers.file}; the same command goes on from there."
        )
        self._stop.set()
        return self._error

    def _cleaned(self, text: str, longest: int | None = 300) -> str:
        """Without the key, which an endpoint might repeat."""
        return (text.replace(self._key, "***") if self._key else text)[:longest]


def _read_key(variable: str | None) -> str:
    """The key; empty where none is needed."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"judge.api_key_variable: the environment variable {variable} holds no key; set it, or set "
            "judge.api_key_variable to null for a server that needs none."
        )
    return key


def _client(key: str, base_url: str | None, timeout: float, retries: int) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise UserError("judge: OpenAIJudge needs the package openai; install it with `pip install openai`.") from error
    return OpenAI(api_key=key or "none", base_url=base_url, timeout=_timeout(timeout), max_retries=retries)


def _timeout(seconds: float) -> Any:
    from openai import Timeout

    return Timeout(seconds, connect=min(seconds, _CONNECT))


def _request_fields(usual: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    ours = {"model", "messages", "stream", "n"} & set(more)
    if ours:
        raise UserError(f"judge.request: {', '.join(sorted(ours))} can't be set there.")
    return {name: value for name, value in usual.items() if value is not None} | more


def _without_secrets(url: str) -> str:
    """A URL without the name and the password that it may hold."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
