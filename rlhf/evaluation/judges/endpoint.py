"""A language model behind an OpenAI-compatible endpoint as a judge."""

import json
import os
import re
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from pydantic import NonNegativeInt, PositiveInt
from typing_extensions import override

from rlhf.errors import NonNegative, Positive, UserError
from rlhf.evaluation.judges.kept_answers import AskingJudge, Entry, Question, Verdict

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
_VERDICTS: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}
_MARKS = re.compile(r"[\s*_`~#>•\-\"'“”<\[\](){}]+")  # emphasis, code, brackets, lists: they say nothing
_LINE = re.compile(r"preferred:(a|b|tie)[.!]?", re.IGNORECASE)
_REFUSED = (400, 413, 422)  # this prompt is too long or against the rules, others may not be
_CONNECT = 5.0  # seconds
_PROBE = 10.0  # seconds


def read_verdict(answer: str) -> Verdict | None:
    """Reads the verdict in the last line of an answer: `Preferred: A`, `Preferred: B` or `Preferred: tie`.

    Emphasis, code fences, brackets, a full stop, blanks and the case of letters do not matter.

    Returns:
        None if the last line is anything else, or if an earlier such line contradicts it.
    """
    lines = [_LINE.fullmatch(line) for text in answer.splitlines() if (line := _MARKS.sub("", text))]
    labels = {match[1].lower() for match in lines if match}
    return _VERDICTS[labels.pop()] if len(labels) == 1 and lines[-1] else None


class OpenAIJudge(AskingJudge):
    """A language model behind an OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp and others.

    Args:
        model: name of the model at the endpoint.
        base_url: URL of the endpoint, for example http://localhost:8000/v1; by default OpenAI's.
        api_key_variable: the environment variable that holds the key; null for a server that needs none.
        template: the question, with `{query}`, `{first}` and `{second}`. It must ask for a last line that is
            `Preferred: A` (the first), `Preferred: B` or `Preferred: tie`.
        temperature: temperature of the answers; null leaves it to the endpoint.
        max_tokens: longest answer; null leaves it to the endpoint.
        request: further fields of each request, for example `{max_completion_tokens: 500, reasoning_effort: low}`.
        concurrency: requests at a time.
        attempts: answers that cannot be read until a question counts as invalid.
        timeout: seconds to wait for an answer.
        retries: how often a request is sent again after a rate limit, a timeout or an error of the server, waiting
            longer each time, or as long as the server says.
        prompt_price: price of a million tokens of questions, to report the cost.
        completion_price: price of a million tokens of answers.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_variable: str | None = "OPENAI_API_KEY",
        template: str = TEMPLATE,
        temperature: NonNegative | None = 0.0,
        max_tokens: PositiveInt | None = 512,
        request: dict[str, Any] | None = None,
        concurrency: PositiveInt = 8,
        attempts: PositiveInt = 3,
        timeout: Positive = 60.0,
        retries: NonNegativeInt = 6,
        prompt_price: NonNegative | None = None,
        completion_price: NonNegative | None = None,
    ) -> None:
        super().__init__(template, attempts)
        if (prompt_price is None) != (completion_price is None):
            raise UserError("judge.prompt_price and judge.completion_price: give both, or neither.")
        if ours := {"model", "messages", "stream", "n"} & set(request or ()):
            raise UserError(f"judge.request: {', '.join(sorted(ours))} cannot be set there.")
        self._key = _read_key(api_key_variable)
        self._client = _client(self._key, base_url, timeout, retries)
        url = urlsplit(str(self._client.base_url))  # may hold a name and a password
        self.endpoint = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}".rstrip("/")
        self.model = model
        usual = {"temperature": temperature, "max_tokens": max_tokens}
        self.request = {name: value for name, value in usual.items() if value is not None} | (request or {})
        self._prices = prompt_price, completion_price
        self._concurrency = concurrency
        self._stop = threading.Event()
        self._error: UserError | None = None

    @property
    @override
    def name(self) -> str:
        return self.model

    @override
    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Verdict], None, None]:
        self._stop.clear()
        self._probe()
        pool = ThreadPoolExecutor(self._concurrency)
        futures = {pool.submit(self._decide, question): question for question in questions}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # answers to requests that are under way are still kept
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    @override
    def usage(self) -> dict[str, float]:
        usage = super().usage()
        prompt, completion = self._prices
        if prompt is not None and completion is not None:
            for of in ("", "_now"):
                price = usage[f"prompt_tokens{of}"] * prompt + usage[f"completion_tokens{of}"] * completion
                usage[f"cost{of}"] = price / 1e6
        return usage

    def _probe(self) -> None:
        """Finds within seconds that the endpoint is down or refuses the key. It need not be able to list its models."""
        import openai

        try:
            self._client.with_options(
                max_retries=0, timeout=openai.Timeout(_PROBE, connect=_CONNECT)
            ).models.with_raw_response.list()
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._stopped(error) from None
        except openai.APIStatusError:
            pass

    def _decide(self, question: Question) -> Verdict:
        """Asks until an answer can be read, `attempts` could not, or the endpoint refuses this question."""
        import openai

        malformed = 0  # replies that hold no answer: not kept, so that the next run asks again
        while (verdict := self.verdict(question)) is None:
            tried = len(self._answers.of(question.key)) + malformed
            if self._stop.is_set():
                raise self._error or CancelledError
            if tried >= self._attempts:
                return "invalid"
            prompt = self.prompt(question) + (f"\n\n{AGAIN}" if tried else "")
            try:
                reply = self._client.chat.completions.with_raw_response.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], extra_body=self.request
                )
            except openai.OpenAIError as error:
                if getattr(error, "status_code", None) not in _REFUSED:
                    raise self._stopped(error) from None
                self._problem = self._cleaned(str(error))
                return "invalid"
            try:
                entry = self._entry(reply.text)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                malformed += 1
                self._problem = f"a reply of another form: {self._cleaned(reply.text)}"
            else:
                self._answers.append(question.key, entry)
        return verdict

    def _entry(self, body: str) -> Entry:
        reply = json.loads(body)
        text = reply["choices"][0]["message"].get("content") or ""
        usage = reply.get("usage") or {}
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        return Entry(read_verdict(text), self._cleaned(text, None), *counts)

    def _stopped(self, error: Exception) -> UserError:
        """Stops all threads, and returns the error for an endpoint that gives no answers."""
        kept = sum(bool(self._answers.of(question.key)) for question in self._asked)
        self._error = UserError(
            f"judge: no answer from the endpoint {self.endpoint}: {self._cleaned(str(error))} "
            f"({type(error).__name__}). {kept} of {len(self._asked)} questions are answered, the answers are in "
            f"{self._answers.file}; the same command asks the others."
        )
        self._stop.set()
        return self._error

    def _cleaned(self, text: str, longest: int | None = 300) -> str:
        """Removes the key, which an endpoint might repeat."""
        return (text.replace(self._key, "***") if self._key else text)[:longest]


def _read_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"judge.api_key_variable: the environment variable {variable} holds no key; set it, or set "
            "judge.api_key_variable to null for a server that needs none."
        )
    return key


def _client(key: str, base_url: str | None, timeout: float, retries: int) -> Any:
    try:
        from openai import OpenAI, Timeout
    except ImportError as error:
        raise UserError("judge: OpenAIJudge needs the package openai; install it with `pip install openai`.") from error
    limits = Timeout(timeout, connect=min(timeout, _CONNECT))
    return OpenAI(api_key=key or "none", base_url=base_url, timeout=limits, max_retries=retries)
