"""A language model behind an OpenAI-compatible endpoint as a judge."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, Future, wait
from queue import Empty, SimpleQueue
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
_CUT = 5  # so many first answers that all end before their verdict are enough
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
        timeout: seconds until the whole answer must be there.
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
        self._stop = threading.Event()
        self._client = _client(self._key, base_url, timeout, retries, self._stop)
        url = urlsplit(str(self._client.base_url))  # may hold a name and a password
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError("judge.base_url must begin with http:// or https://, as http://localhost:8000/v1 does.")
        self.endpoint = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}".rstrip("/")
        self.model = model
        usual = {"temperature": temperature, "max_tokens": max_tokens}
        self.request = {name: value for name, value in usual.items() if value is not None} | (request or {})
        self._prices = prompt_price, completion_price
        self._concurrency, self._timeout = concurrency, timeout
        self._cut: list[bool] = []  # which answers of this run ended at the limit of tokens, before a verdict
        self._error: UserError | None = None

    @property
    @override
    def name(self) -> str:
        return self.model

    @override
    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Verdict], None, None]:
        self._stop.clear()
        self._cut, self._error = [], None
        self._probe()
        left: SimpleQueue[Question] = SimpleQueue()
        done: SimpleQueue[tuple[Question, Verdict | BaseException]] = SimpleQueue()
        for question in questions:
            left.put(question)
        count = min(self._concurrency, len(questions))  # daemons: a silent endpoint does not hold up the end
        threads = [threading.Thread(target=self._work, args=(left, done), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for _ in questions:
                question, verdict = done.get()
                if isinstance(verdict, BaseException):
                    raise self._error or verdict
                yield question, verdict
        finally:
            self._stop.set()
            _wait_for(threads, self._timeout)

    def _work(self, left: SimpleQueue[Question], done: SimpleQueue[tuple[Question, Verdict | BaseException]]) -> None:
        while not self._stop.is_set():
            try:
                question = left.get_nowait()
            except Empty:
                return
            try:
                done.put((question, self._decide(question)))
            except BaseException as error:  # for the thread that waits
                done.put((question, error))

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
            except Exception:  # whatever an endpoint sends
                malformed += 1
                self._problem = f"a reply of another form: {self._cleaned(reply.text)!r}"
            else:
                self._answers.append(question.key, entry)
                self._check_length()
        return verdict

    def _entry(self, body: str) -> Entry:
        reply = json.loads(body)
        choice = reply["choices"][0]
        text = choice["message"].get("content") or ""
        entry = Entry(read_verdict(text), self._cleaned(text, None), *_counts(reply.get("usage")))
        self._cut.append(entry.verdict is None and choice.get("finish_reason") == "length")
        return entry

    def _check_length(self) -> None:
        """Stops before many answers are paid for that end before their verdict."""
        if len(self._cut) >= min(_CUT, len(self._asked)) and all(self._cut):
            limits = ", ".join(f"{name} is {value}" for name, value in self.request.items() if "tokens" in name)
            self._error = self._error or UserError(
                f"judge.max_tokens: each of the first {len(self._cut)} answers was cut off (finish_reason: length) "
                f"before it said what it prefers; raise the limit ({limits or 'the endpoint has one of its own'}), to "
                "thousands for a model that thinks before it answers."
            )
            self._stop.set()
            raise self._error

    def _stopped(self, error: Exception) -> UserError:
        """Stops all threads, and returns the error for an endpoint that gives no answers."""
        kept = sum(bool(self._answers.of(question.key)) for question in self._asked)
        said = self._cleaned(f"{error} ({type(error).__name__}{f': {error.__cause__}' if error.__cause__ else ''})")
        self._error = self._error or UserError(
            f"judge: no answer from the endpoint {self.endpoint}: {said}. {kept} of {len(self._asked)} questions are "
            f"answered, the answers are in {self._answers.file}; the same command asks the others."
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
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"judge.api_key_variable: the key in the environment variable {variable} has characters that no key has, "
            "such as letters with accents or line ends; copy it again."
        )
    return key


def _counts(usage: Any) -> list[int]:
    """Returns the tokens of question and answer; 0 where an endpoint does not say: the answer counts all the same."""
    known = usage if isinstance(usage, dict) else {}
    counts = (known.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return [count if isinstance(count, int) else 0 for count in counts]


def _wait_for(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Waits for answers that are under way, so that they are kept."""
    end = time.monotonic() + seconds
    if busy := sum(thread.is_alive() for thread in threads):
        print(f"waiting for up to {busy} answers that are on their way (Ctrl-C: not for them)", file=sys.stderr)
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def _client(key: str, base_url: str | None, timeout: float, retries: int, stop: threading.Event) -> Any:
    try:
        from openai import DefaultHttpxClient, OpenAI, Timeout
    except ImportError as error:
        raise UserError("judge: OpenAIJudge needs the package openai; install it with `pip install openai`.") from error

    base: Any = DefaultHttpxClient.__base__
    http = sys.modules[base.__module__]  # httpx or, from openai 3 on, httpx2

    class Client(DefaultHttpxClient):
        """Gives a request its time in all: httpx's own limit begins again with every byte that comes."""

        @override
        def send(self, request: Any, **kwargs: Any) -> Any:
            if stop.is_set():  # no further tries
                raise CancelledError
            reply: Future[Any] = Future()
            send, limit = super().send, request.extensions["timeout"]["read"]

            def work() -> None:
                try:
                    reply.set_result(send(request, **kwargs))
                except BaseException as error:  # for the thread that waits
                    reply.set_exception(error)

            threading.Thread(target=work, daemon=True).start()
            if wait([reply], limit).not_done:
                raise http.ReadTimeout(f"no whole answer within {limit:g} s", request=request)
            return reply.result()

    limits = Timeout(timeout, connect=min(timeout, _CONNECT))
    return OpenAI(api_key=key or "none", base_url=base_url, timeout=limits, max_retries=retries, http_client=Client())
