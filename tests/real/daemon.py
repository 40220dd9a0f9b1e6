"""aiproxy as its users run it: a daemon process between the official SDKs and a real model."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anthropic
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Daemon:
    """A running `aiproxy serve`: where it listens, the key it knows, its process and its log."""

    listen: str
    admin: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path

    def openai(self, key: str | None = None) -> openai.OpenAI:
        """Give an OpenAI client of this daemon that tries once."""
        return openai.OpenAI(
            base_url=f"http://{self.listen}/v1", api_key=key or self.key, max_retries=0
        )

    def anthropic(self, key: str | None = None) -> anthropic.Anthropic:
        """Give an Anthropic client of this daemon that tries once."""
        return anthropic.Anthropic(
            base_url=f"http://{self.listen}", api_key=key or self.key, max_retries=0
        )

    def metric(self, name: str, **labels: str) -> float:
        """Add up the samples of one metric that carry these labels."""
        status, text = get(self.admin, "/metrics")
        assert status == 200
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def tokens(self) -> Tokens:
        """Read what `aiproxy_tokens_total` has counted for the test's key and route."""

        def count(kind: str) -> int:
            return int(self.metric("aiproxy_tokens_total", route="smol", key="real", type=kind))

        return Tokens(count("input"), count("input_cached"), count("output"))

    def spent_since(self, before: Tokens) -> Tokens:
        """Wait until the last request is over and counted, and give what it added."""
        until("the tokens are counted", lambda: self.tokens().output > before.output)
        until("no request is open", lambda: self.metric("aiproxy_requests_in_flight") == 0)
        after = self.tokens()
        return Tokens(
            after.input - before.input,
            after.input_cached - before.input_cached,
            after.output - before.output,
        )


@dataclass(frozen=True)
class Tokens:
    """Tokens by kind; the kinds are disjoint."""

    input: int
    input_cached: int
    output: int


def until(what: str, holds: Callable[[], bool], limit: float = 10.0, every: float = 0.02) -> None:
    """Poll until it holds; fail after `limit` seconds."""
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > limit:
            pytest.fail(f"not within {limit} s: {what}")
        time.sleep(every)


def get(host: str, path: str) -> tuple[int, str]:
    """Ask for a path; return status and body."""
    with contextlib.closing(http.client.HTTPConnection(host, timeout=10)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def answers(host: str, path: str, status: int) -> bool:
    """Tell whether a path is answered with this status."""
    try:
        return get(host, path)[0] == status
    except (OSError, http.client.HTTPException):
        return False


def busy_slots(llama_server: str) -> int:
    """Ask llama.cpp how many of its slots are generating."""
    _, text = get(llama_server.removeprefix("http://").removesuffix("/v1"), "/slots")
    return sum(slot["is_processing"] for slot in json.loads(text))


def _two_free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@contextlib.contextmanager
def serving(llama_server: str, folder: Path) -> Iterator[Daemon]:
    """Run `aiproxy serve` before the model until the block ends."""
    key = "sk-aip-" + secrets.token_urlsafe(32)
    listen, admin = (f"127.0.0.1:{port}" for port in _two_free_ports())
    config = folder / "aiproxy.yaml"
    config.write_text(f"""\
listen: {listen}
admin: {admin}
upstreams:
  llama:
    url: {llama_server}
    apis: [chat, messages, embeddings, responses]
  llama-chat:
    url: {llama_server}
    apis: [chat]
  llama-messages:
    url: {llama_server}
    apis: [messages]
  llama-responses:
    url: {llama_server}
    apis: [responses]
    normalize: true
routes:
  - model: smol
    upstreams:
      - {{name: llama, model: smollm2}}
  - model: over-chat
    upstreams:
      - {{name: llama-chat, model: smollm2}}
    unsupported_tools: drop
  - model: over-messages
    upstreams:
      - {{name: llama-messages, model: smollm2}}
  - model: normalized
    upstreams:
      - {{name: llama-responses, model: smollm2}}
keys:
  real:
    sha256: "{hashlib.sha256(key.encode()).hexdigest()}"
drain: {{delay: 0s, timeout: 30s}}
""")
    log_file = folder / "aiproxy.log"
    with (
        log_file.open("wb") as log,
        subprocess.Popen(  # noqa: S603  (our own interpreter, our own program)
            [sys.executable, "-m", "aiproxy", "serve", "--config", str(config)],
            env={**os.environ, "STATE_DIRECTORY": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        daemon = Daemon(listen, admin, key, process, log_file)
        try:
            until(
                "aiproxy is ready",
                lambda: process.poll() is not None or answers(admin, "/-/ready", 200),
                limit=30,
            )
            assert process.poll() is None, log_file.read_text(errors="replace")
            yield daemon
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
