"""The judge behind an OpenAI-compatible endpoint, against a real HTTP server."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.evaluation.judges import endpoint
from rlhf.evaluation.judges.endpoint import AGAIN, OpenAIJudge, read_verdict
from tests.evaluation.judges.conftest import completion

KEY = "sk-very-secret-0123456789"


def writes(*parts: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Writes bytes to a connection, with pauses between them, and closes it."""

    def write(connection: socket.socket) -> None:
        with suppress(OSError):  # the client may have gone
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            connection.shutdown(socket.SHUT_RDWR)

    return write


def head(*lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode()


def truth(prompt: str, times: int = 1) -> str:
    """An honest judge: the larger number wins, equal ones tie."""
    texts = [prompt.split(f"### Summary {label}\n")[1].split("\n")[0] for label in "AB"]
    first, second = (int(text.split()[-1]) for text in texts)
    label = "A" if first > second else "B" if second > first else "tie"
    return f"One of them is better.\nPreferred: {label}"


def is_true(table: pd.DataFrame) -> bool:
    """Whether a judged table says what the honest judge thinks."""
    ours, theirs = (table[side].str.split().str[-1].astype(int) for side in "ab")
    outcome = (ours > theirs) + 0.5 * (ours == theirs)
    return bool((table["outcome"] == outcome).all() and (table["a_first"] == table["b_first"]).all())


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "judged.parquet.json").read_text())["summary"]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Better.\nPreferred: A", "first"),
        ("Preferred: B\n\n", "second"),
        ("  Preferred: tie  ", "tie"),
        ("Preferred: A\nPreferred: A", "first"),
        ("Preferred: A\nPreferred: B", None),
        ("Preferred: A\nThat is all.", None),
        ("preferred: b", "second"),
        ("PREFERRED: TIE", "tie"),
        ("Preferred: C", None),
        ("Preferred: A or B", None),
        ("Preferred: both", None),
        ("Preferred: a tie-break for B", None),
        ("**Preferred: A**", "first"),
        ("**Preferred:** B", "second"),
        ("Preferred: **B**", "second"),
        ("Preferred: A.", "first"),
        ("**Preferred: A.**", "first"),
        ("Preferred:A", "first"),
        ("Preferred: [A]", "first"),
        ("Preferred: <B>", "second"),
        ("Preferred: (tie)", "tie"),
        ("- Preferred: `A`", "first"),
        ("### Preferred: 'B'", "second"),
        ("```\nPreferred: A\n```", "first"),
        ("```text\nBoth are good.\nPreferred: tie\n```\n", "tie"),
        ("**Preferred: A**\nPreferred: B", None),
        ("**Preferred: A**\nI am sure.", None),
        ("***", None),
        ("A", None),
        ("", None),
    ],
)
def test_an_answer_is_read_whatever_stands_around_its_last_line(answer: str, verdict: str | None) -> None:
    assert read_verdict(answer) == verdict


def test_every_trouble_at_once_and_the_truth_comes_out(
    endpoint: Callable[..., Any], tables: Any, asked: Any, tmp_path: Path
) -> None:
    numbers: dict[str, int] = {}

    troubles = [
        429, 503, None, b"{not json", b'{"choices": []}', "Both are fine.", "", b"[" * 10**5, b"\xff\x00",
        writes(head("Content-Length: 99"), b"{"), writes(b"no http\r\n\r\n"), writes(),
        writes(head("Content-Encoding: gzip", "Content-Length: 4"), b"zipp"),
        writes(b"HTTP/1.1 308 Permanent Redirect\r\nLocation: ftp://\r\n\r\n"),
    ]  # fmt: skip

    def script(prompt: str, times: int) -> Any:
        number = numbers.setdefault(prompt.removesuffix(f"\n\n{AGAIN}"), len(numbers))
        first = times == 1 and AGAIN not in prompt and number < len(troubles)
        return troubles[number] if first else truth(prompt)

    server = endpoint(script)
    words = [*tables(12), *asked(server), "--judge.timeout=0.7", "--judge.concurrency=4"]
    main([*words, "--judge.prompt_price=2", "--judge.completion_price=10"])
    table = pd.read_parquet(tmp_path / "judged.parquet")
    assert len(table) == 12
    assert is_true(table)
    assert server.busiest <= 5  # one that the client gave up may still sleep
    assert len(server.waits) > 0
    assert min(server.waits) > 0.29  # as the server asked
    said = summary(tmp_path)
    sent = sum(server.answered.values())
    assert sent == 24 + 2  # two could not be read
    assert set(server.answered.values()) == {1}  # nothing is asked twice
    assert said["usage"]["answers"] == said["usage"]["answers_now"] == sent
    assert said["usage"]["prompt_tokens"] == 100 * sent
    assert said["usage"]["cost"] == pytest.approx(sent * (100 * 2 + 10 * 10) / 1e6)
    assert said["invalid"] == 0
    assert said["position_bias"] == 0
    assert said["order_agreement"] == 1


@pytest.mark.parametrize("where", ["in the body", "in the head"])
def test_an_answer_that_comes_byte_by_byte_is_not_waited_for(
    where: str, endpoint: Callable[..., Any], tables: Any, asked: Any, tmp_path: Path
) -> None:
    body = completion("Preferred: tie")
    start = head(f"Content-Length: {len(body)}")
    whole, slow = (start, body) if where == "in the body" else (b"", start + body)
    dribble = writes(whole, *(bytes([byte]) for byte in slow), pause=0.1)
    server = endpoint(lambda prompt, times: truth(prompt) if times == 2 else dribble)
    main([*tables(2), *asked(server), "--judge.timeout=0.5"])
    assert is_true(pd.read_parquet(tmp_path / "judged.parquet"))
    assert set(server.seen.values()) == {2}


def test_answers_that_are_cut_off_stop_early_and_name_the_limit(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = endpoint(lambda prompt, times: completion("", "length"))
    words = [*tables(40), *asked(server), "--judge.concurrency=2"]
    said = refusal(words, capsys)
    assert "judge.max_tokens: each of the first 5 answers was cut off (finish_reason: length)" in said
    assert "raise the limit (max_tokens is 512)" in said
    assert sum(server.seen.values()) <= 5 + 2
    one = [*tables(1), *asked(server), "--judge.attempts=1", f"--output={tmp_path}/one.parquet"]
    assert "judge.max_tokens: each of the first 2 answers" in refusal(one, capsys)


def test_an_answer_that_is_cut_off_after_its_verdict_counts_and_another_is_asked_again(
    endpoint: Callable[..., Any], tables: Any, asked: Any, tmp_path: Path
) -> None:
    def script(prompt: str, times: int) -> bytes:
        cut = "Post number 7" in prompt and AGAIN not in prompt
        return completion("" if cut else truth(prompt), "length")

    server = endpoint(script)
    main([*tables(8), *asked(server)])
    assert is_true(pd.read_parquet(tmp_path / "judged.parquet"))
    assert sum(server.seen.values()) == 16 + 2


def test_an_answer_counts_whatever_is_said_of_its_tokens(
    endpoint: Callable[..., Any], tables: Any, asked: Any, tmp_path: Path
) -> None:
    usages = itertools.cycle([float("inf"), {"prompt_tokens": "many"}, ["?"], {"prompt_tokens": 1e999}])
    server = endpoint(lambda prompt, times: completion(truth(prompt), usage=next(usages)))
    main([*tables(4), *asked(server)])
    assert is_true(pd.read_parquet(tmp_path / "judged.parquet"))
    assert set(server.seen.values()) == {1}


def test_interrupted_at_a_silent_endpoint_it_ends_after_one_timeout(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It does not try again, and what it leaves behind does not hold up the end of the process.

    The timeout is shorter, and begins with the interrupt: before that, a busy machine may take longer.
    """
    module, interrupted = sys.modules[OpenAIJudge.__module__], threading.Event()
    wait, wait_for = module.wait, module._wait_for

    def wait_for_reply(replies: list[Any], limit: float) -> Any:
        while not (interrupted.is_set() or replies[0].done()):
            time.sleep(0.01)
        return wait(replies, limit / 60)

    def wait_for_threads(threads: list[threading.Thread], seconds: float) -> None:
        interrupted.set()
        wait_for(threads, seconds / 30)

    monkeypatch.setattr(module, "wait", wait_for_reply)
    monkeypatch.setattr(module, "_wait_for", wait_for_threads)
    calls = itertools.count(1)
    server = endpoint(lambda prompt, times: interrupt() if next(calls) == 2 else None)
    interrupt = lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # noqa: E731
    before = set(threading.enumerate())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets jobs in the background ignore it
    try:
        with pytest.raises(SystemExit) as stop:
            main([*tables(6), *asked(server), "--judge.concurrency=2", "--judge.timeout=60"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stop.value.code == 130
    assert sum(server.seen.values()) == 2
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    assert "waiting for up to 2 answers that are on their way" in capsys.readouterr().err


def test_a_judge_of_what_stands_first(endpoint: Callable[..., Any], tables: Any, asked: Any, tmp_path: Path) -> None:
    main([*tables(10), *asked(endpoint(lambda prompt, times: "Preferred: A"))])
    table, said = pd.read_parquet(tmp_path / "judged.parquet"), summary(tmp_path)
    assert (table["a_first"] == "a").all()
    assert (table["b_first"] == "b").all()
    assert (said["win_rate"], said["position_bias"], said["order_agreement"]) == (0.5, 1, 0)


def test_killed_in_the_middle_nothing_is_lost_or_asked_twice(
    endpoint: Callable[..., Any], tables: Any, asked: Any, tmp_path: Path
) -> None:
    server = endpoint(truth, delay=0.05)
    words = [*tables(30), *asked(server), "--judge.concurrency=2"]
    run = subprocess.Popen([sys.executable, "-m", "rlhf", *words], env={**os.environ, "PYTHONPATH": os.getcwd()})
    answers = tmp_path / "judged.parquet.answers.jsonl"
    while not answers.exists() or answers.read_text().count("\n") < 10:
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = answers.read_text().count("\n")
    assert 10 <= kept < 60
    time.sleep(0.2)  # what is on its way arrives nowhere
    with answers.open("a") as stream:
        stream.write('{"key": "torn')
    before = sum(server.answered.values())
    server.delay = 0
    main(words)
    assert is_true(pd.read_parquet(tmp_path / "judged.parquet"))
    assert sum(server.answered.values()) - before == 60 - kept
    assert len(server.answered) == 60
    assert summary(tmp_path)["usage"]["answers_now"] == 60 - kept
    assert summary(tmp_path)["usage"]["answers"] == 60
    main(words)  # finished
    main([*words, f"--output={tmp_path}/again.csv", f"--answers={answers}"])  # another table, the same questions
    assert sum(server.answered.values()) - before == 60 - kept


def test_an_unreadable_answer_is_asked_again_with_a_note_then_invalid(
    endpoint: Callable[..., Any], tables: Any, asked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(prompt: str, times: int) -> str:
        return "I prefer neither." if "Post number 3" in prompt or "Post number 0" in prompt else truth(prompt)

    server = endpoint(script)
    words = [*tables(5), *asked(server), "--judge.attempts=3"]
    main(words)
    table = pd.read_parquet(tmp_path / "judged.parquet").set_index("query")
    assert table["outcome"].isna().tolist() == [True, False, False, True, False]
    assert (table.loc["Post number 3", ["a_first", "b_first"]] == "invalid").all()
    assert summary(tmp_path)["invalid"] == 2
    tries = {prompt: times for prompt, times in server.seen.items() if "Post number 3" in prompt}
    assert sorted(tries.values()) == [1, 1, 2, 2]
    assert all((AGAIN in prompt) == (times == 2) for prompt, times in tries.items())
    before = sum(server.seen.values())
    main([*words, f"--output={tmp_path}/b.csv", f"--answers={tmp_path}/judged.parquet.answers.jsonl"])
    assert sum(server.seen.values()) == before  # invalid, too, is known
    assert "WARNING" not in capsys.readouterr().err
    main([*tables(4), *asked(server), f"--output={tmp_path}/c.csv", "--judge.temperature=1"])
    capsys.readouterr()


def test_mostly_invalid_is_said_aloud(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script = lambda prompt, times: truth(prompt) if "Post number 3" in prompt else "?"  # noqa: E731
    main([*tables(4), *asked(endpoint(script)), "--judge.attempts=1"])
    assert "WARNING: 3 of 4 rows are invalid" in capsys.readouterr().err


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_rubbish_throughout_stops_early(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = endpoint(lambda prompt, times: "As a language model I like both.")
    words = [*tables(100), *asked(server), "--judge.attempts=2"]
    said = refusal(words, capsys)
    assert "not one of 20 questions got an answer that can be read" in said
    assert "I like both" in said
    assert sum(server.seen.values()) <= 2 * (20 + 2 * 8)
    assert not (tmp_path / "judged.parquet").exists()
    few = [word.replace("ours", "few") for word in words]
    pd.read_parquet(tmp_path / "ours.parquet").head(2).to_parquet(tmp_path / "few.parquet")
    assert "not one of 4 questions" in refusal(few, capsys)


def test_a_refused_prompt_is_invalid_and_a_refused_request_stops(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main([*tables(3), *asked(endpoint(lambda p, times: 400 if "Post number 1" in p else truth(p)))])
    assert summary(tmp_path)["invalid"] == 1
    for status in (401, 404):
        words = [*tables(3), *asked(endpoint(lambda prompt, times, status=status: status))]
        assert f"Error code: {status}" in refusal([*words, f"--output={tmp_path}/{status}.csv"], capsys)
    words = [*tables(3), *asked(endpoint(lambda prompt, times: 400)), f"--output={tmp_path}/400.csv"]
    said = refusal(words, capsys)
    assert "status 400" in said
    assert KEY not in said


def test_an_endpoint_that_is_silent_says_so_soon(
    tables: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "_PROBE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes calls and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        judge = ["--judge=OpenAIJudge", "--judge.model=m", "--judge.api_key_variable=null", f"--judge.base_url={url}"]
        start = time.monotonic()
        said = refusal([*tables(3), *judge], capsys)
    assert f"no answer from the endpoint {url}: Request timed out" in said
    assert time.monotonic() - start < 5


def test_an_endpoint_that_is_down_says_so_soon(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = endpoint(truth)
    words = [*tables(3), *asked(server)]
    words[-1] = "--judge.base_url=http://someone:password@127.0.0.1:9/v1"
    start = time.monotonic()
    said = refusal(words, capsys)
    assert "no answer from the endpoint http://127.0.0.1:9/v1" in said
    assert "0 of 6 questions are answered" in said
    assert "password" not in said
    assert time.monotonic() - start < 5


def test_an_endpoint_that_goes_away_keeps_what_it_answered(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone = [True]
    server = endpoint(lambda prompt, times: 503 if gone[0] and sum(server.seen.values()) > 8 else truth(prompt))
    words = [*tables(10), *asked(server), "--judge.retries=0", "--judge.concurrency=1"]
    assert "8 of 20 questions are answered" in refusal(words, capsys)
    gone[0] = False
    main(words)
    assert is_true(pd.read_parquet(tmp_path / "judged.parquet"))
    assert set(server.answered.values()) == {1}


def test_no_key(tables: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = [*tables(3), "--judge=OpenAIJudge", "--judge.model=m"]
    said = refusal(words, capsys)
    assert "the environment variable OPENAI_API_KEY holds no key" in said
    assert "api_key_variable to null" in said


@pytest.mark.parametrize("key", ["cl\u00e9-1", "sk-1\nx"])
def test_a_key_that_no_request_can_hold(
    key: str, tables: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = refusal([*tables(3), "--judge=OpenAIJudge", "--judge.model=m"], capsys)
    assert "OPENAI_API_KEY has characters that no key has" in said
    assert key not in said


def test_the_cause_of_a_connection_that_fails_is_said(
    tables: Any, asked: Any, endpoint: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = asked(endpoint(truth))
    said = refusal([*tables(3), *words[:-1], words[-1].replace("=http:", "=https:")], capsys)
    assert "WRONG_VERSION_NUMBER" in said  # TLS, with a server that has none


def test_a_local_server_needs_no_key(
    endpoint: Callable[..., Any], tables: Any, asked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = endpoint(truth)
    words = [*tables(3), *asked(server), "--judge.api_key_variable=null"]
    main(words)
    assert is_true(pd.read_parquet(tmp_path / "judged.parquet"))
    assert {headers["authorization"] for headers in server.headers} == {"Bearer none"}


def test_the_key_is_nowhere(
    endpoint: Callable[..., Any], tables: Any, asked: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = endpoint(lambda prompt, times: f"You are {KEY}.\n{truth(prompt)}")
    main([*tables(4), *asked(server)])
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    refusal([*tables(4), *asked(endpoint(lambda prompt, times: 401)), f"--output={tmp_path}/b.csv"], capsys)
    shown = capsys.readouterr()
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY not in shown.out + shown.err
    assert KEY.encode() not in written
    assert b"***" in written


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"template": "{query} {first}"}, "judge.template must have the fields"),
        ({"template": "{query} {first} {second} {third}"}, "judge.template must have the fields"),
        ({"template": "{query"}, "judge.template is not a format string"),
        ({"request": {"stream": True}}, "judge.request: stream"),
        ({"prompt_price": 1.0}, "give both"),
        ({"base_url": "localhost:8000/v1"}, "judge.base_url must begin with http:// or https://"),
        ({"base_url": "/v1"}, "judge.base_url must begin with http:// or https://"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        OpenAIJudge("m", api_key_variable=None, **{"base_url": "http://127.0.0.1:9", **settings})


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("OpenAIJudge.concurrency=0", "concurrency.*greater than 0"),
        ("OpenAIJudge.attempts=0", "attempts.*greater than 0"),
        ("OpenAIJudge.timeout=0.0", "timeout.*greater than 0"),
        ("OpenAIJudge.retries=-1", "retries.*(equal to|at least) 0"),
        ("LocalJudge.batch_size=0", "batch_size.*greater than 0"),
        ("RewardJudge.batch_size=0", "batch_size.*greater than 0"),
    ],
)
def test_numbers_out_of_range(word: str, sentence: str, tables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name, setting = word.split(".", 1)
    assert re.search(
        sentence, refusal([*tables(3), f"--judge={name}", "--judge.model=m", f"--judge.{setting}"], capsys)
    )


def test_what_a_request_holds(endpoint: Callable[..., Any], tables: Any, asked: Any) -> None:
    judge = OpenAIJudge("m", api_key_variable=None, temperature=None, request={"reasoning_effort": "low"})
    assert judge.request == {"max_tokens": 512, "reasoning_effort": "low"}
    assert judge.settings() == OpenAIJudge("m", api_key_variable=None, temperature=None, attempts=9, timeout=1,
                                           request={"reasoning_effort": "low"}).settings()  # fmt: skip
