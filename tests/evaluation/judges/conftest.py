"""A small server that speaks the OpenAI protocol, and tables to judge."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf.evaluation.tables import write_table

KEY = "sk-very-secret-0123456789"


Reply = str | int | bytes | None | Callable[[Any], None]


def completion(text: str, finish_reason: str = "stop", usage: Any = None) -> bytes:
    """The body of an answer."""
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    message = {"role": "assistant", "content": text}
    reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
    return json.dumps(reply | {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}).encode()


@dataclass
class Endpoint:
    """A server whose replies are scripted: `script(prompt, times)` says what is done with a prompt that comes for the
    `times`-th time, where text is an answer, a number an HTTP status, bytes a raw body, None silence, and a function
    writes to the connection itself.
    """

    script: Callable[[str, int], Reply]
    seen: Counter[str] = field(default_factory=Counter)  # prompts that came
    answered: Counter[str] = field(default_factory=Counter)  # prompts with an answer that was sent
    headers: list[dict[str, str]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # from a 429 to the next try
    delay: float = 0.0
    busiest: int = 0
    url: str = ""
    _busy: int = 0
    _lock: Any = field(default_factory=threading.Lock)
    _limited: dict[str, float] = field(default_factory=dict)

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self._lock:
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
            self.seen[prompt] += 1
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            if prompt in self._limited:
                self.waits.append(time.monotonic() - self._limited.pop(prompt))
            what = self.script(prompt, self.seen[prompt])
        time.sleep(self.delay)
        try:
            self._send(handler, prompt, what)
        finally:
            with self._lock:
                self._busy -= 1

    def _send(self, handler: BaseHTTPRequestHandler, prompt: str, what: Reply) -> None:
        if callable(what):
            handler.close_connection = True
            what(handler.connection)
            return
        if what is None:
            time.sleep(1.5)
            return
        if isinstance(what, int):
            with self._lock:
                self._limited[prompt] = time.monotonic()
            authorization = handler.headers.get("Authorization", "")
            error = json.dumps({"error": {"message": f"status {what} for {authorization}"}}).encode()
            send(handler, error, what, {"Retry-After": "0.3"} if what == 429 else {})
            return
        if isinstance(what, str):
            what = completion(what)
            with self._lock:
                self.answered[prompt] += 1
        send(handler, what, 200, {})


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    """Starts an endpoint with a script."""
    servers: list[ThreadingHTTPServer] = []

    def start(script: Callable[[str, int], Reply], **settings: Any) -> Endpoint:
        ours = Endpoint(script, **settings)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                send(self, b'{"object": "list", "data": []}', 200, {})

            def do_POST(self) -> None:
                ours.reply(self)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        ours.url = f"http://127.0.0.1:{server.server_port}/v1"
        return ours

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tables(tmp_path: Path) -> Callable[[int], list[str]]:
    """Words that judge `ours.parquet`, with n rows, against its references; the texts end in their strengths."""

    def make(n: int) -> list[str]:
        rows = pd.DataFrame({
            "query": [f"Post number {i}" for i in range(n)],
            "response": [f" a text of strength {i % 5}" for i in range(n)],
            "reference": [f" another of strength {(i * 3 + 2) % 5}" for i in range(n)],
            "tokens": range(n), "reference_tokens": [7] * n, "has_eos": [True] * n,
        })  # fmt: skip
        write_table(rows, tmp_path / "ours.parquet")
        words = [f"--{side}.table={tmp_path}/ours.parquet" for side in "ab"]
        return ["judge", f"--output={tmp_path}/judged.parquet", *words, "--b.column=reference"]

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Endpoint], list[str]]:
    """Words for a judge at an endpoint; the key is set."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def words(endpoint: Endpoint) -> list[str]:
        return ["--judge=OpenAIJudge", "--judge.model=m", f"--judge.base_url={endpoint.url}"]

    return words
