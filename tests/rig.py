"""The real daemon in the test's own loop, with a configuration and keys that tests know.

What must be true of it after every case is in `invariants`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import yaml
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from aiproxy.config import Loaded, loads
from aiproxy.daemon import Daemon
from client import Answer, Fields, RawClient

if TYPE_CHECKING:
    from aiproxy.config import Config

# Seeded secrets: none may be seen outside, the canaries neither in log nor in metrics.
TEAM_A = "sk-aip-Zk7-team-a-4mVq8sLw2RtYb6NcX1dPfHgJ"
TEAM_B = "sk-aip-Xq3-team-b-9pTz5kBv7WnMc2LrD8sGhJfY"
CREDENTIAL = "sk-upstream-credential-8842-QwErTy"
PROMPT_CANARY = "PROMPT-CANARY-7431"
OUTPUT_CANARY = "OUTPUT-CANARY-2719"

# Refuse nothing, but are taken and given back by every request.
AMPLE = {"requests": "900000000/min", "tokens": "900000000000/min", "concurrent": 900000000}

ABSENT = object()  # as an override: leave the key out

Labels = frozenset[tuple[str, str]]
Metrics = dict[tuple[str, Labels], float]


def key_hash(key: str) -> str:
    """Return the hash of a client key as the configuration has it."""
    return hashlib.sha256(key.encode()).hexdigest()


class _Dumper(yaml.SafeDumper):
    """Quotes every string, so that no reader takes one for a number or an alias."""

    def ignore_aliases(self, data: object) -> bool:
        """Write everything in full: the configuration refuses anchors."""
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


_Dumper.add_representer(str, _quoted)


def routes(**changes: Any) -> list[dict[str, Any]]:
    """Return the usual routes, with changes to the first, `gpt-test`."""
    renamed = {"name": "scripted", "model": "upstream-model"}
    return [
        {"model": "gpt-test", "upstreams": ["scripted"]} | changes,
        {"model": "renamed", "upstreams": [renamed]},
        {"model": "org/*", "upstreams": ["scripted"], "list": ["org/small"]},
    ]


def base_config(upstream_url: str) -> dict[str, Any]:
    """Return the configuration that tests change."""
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "upstreams": {
            "scripted": {
                "url": upstream_url,
                "credential": {"env": "UPSTREAM_KEY"},
                "apis": ["responses", "chat", "messages", "embeddings"],
                "sessions": "upstream",  # then its bytes pass as they are
                "idle_connections": "500ms",  # below SETTLE, so that pooled ones are gone by then
            }
        },
        "routes": routes(),
        "keys": {
            "team-a": {"sha256": key_hash(TEAM_A), "limits": AMPLE},
            "team-b": {"sha256": key_hash(TEAM_B)},
        },
        # One attempt each, and nobody is left alone: the tests of these say otherwise.
        "retries": 0,
        "breaker": {"failures": 1_000_000},
        "drain": {"delay": "0s", "timeout": "5s"},
        "log": {"level": "debug", "format": "json"},
    }


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    whole = dict(base)
    for name, value in changes.items():
        old = whole.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        whole[name] = _merged(cast("Any", old), value) if both else value
    return {name: value for name, value in whole.items() if value is not ABSENT}


def config_text(upstream_url: str, holder: str = "upstream", /, **changes: Any) -> str:
    """Return the configuration as YAML: mappings are merged, all else is replaced.

    `holder` is the usual upstream's `sessions`.
    """
    base = base_config(upstream_url)
    base["upstreams"]["scripted"]["sessions"] = holder
    whole = _merged(base, changes)
    return yaml.dump(whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def prompt(path: str = "/v1/responses", model: str = "gpt-test", **fields: Any) -> dict[str, Any]:
    """Return a body that the endpoint takes; its prompt is the canary."""
    text = f"Say hello. {PROMPT_CANARY}"
    messages = [{"role": "user", "content": text}]
    asked: dict[str, dict[str, Any]] = {
        "/v1/responses": {"input": text},
        "/v1/chat/completions": {"messages": messages},
        "/v1/messages": {"messages": messages, "max_tokens": 64},
        "/v1/embeddings": {"input": text},
    }
    return {"model": model, **asked[path], **fields}


def load(text: str, environ: Mapping[str, str] | None = None) -> "Config":
    """Read a configuration with the seeded credential in its environment."""
    known = {"UPSTREAM_KEY": CREDENTIAL, **(environ or {})}
    return loads(text, path=Path("test.yaml"), environ=known).config


class LogTap:
    """Where the daemon writes its log: a stream of bytes that is kept."""

    def __init__(self) -> None:
        self.raw = b""

    def write(self, data: bytes | memoryview, /) -> int:
        """Keep some bytes; a line may come in parts."""
        self.raw += bytes(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: all is kept already."""

    def lines(self) -> list[dict[str, Any]]:
        """Return the finished lines; a journald priority before one is cut."""
        whole = self.raw[: self.raw.rfind(b"\n") + 1]
        return [json.loads(re.sub(rb"^<\d>", b"", line)) for line in whole.splitlines()]


class Proxy:
    """A daemon that runs, and the usual ways to talk to it. Make it with `Proxy.start`."""

    key = TEAM_A
    other_key = TEAM_B

    def __init__(self, text: str, environ: Mapping[str, str] | None = None, **options: Any) -> None:
        self.text = text  # of the file; a reload reads what it is then
        self.environ = {"UPSTREAM_KEY": CREDENTIAL, **(environ or {})}
        self.tap = LogTap()
        loaded = self._load()
        self.daemon = Daemon(
            loaded.config, path="test.yaml", source=self._load, log_stream=self.tap, **options
        )
        self._clients: list[RawClient] = []

    @classmethod
    async def start(
        cls, text: str, environ: Mapping[str, str] | None = None, **options: Any
    ) -> Self:
        """Start a daemon with this YAML; options as of `Daemon`."""
        proxy = cls(text, environ, **options)
        await proxy.daemon.start()
        return proxy

    def _load(self) -> Loaded:
        return loads(self.text, path=Path("test.yaml"), environ=self.environ)

    async def stop(self) -> None:
        """End the daemon at once, in order, after the clients of the test."""
        await self.close_clients()
        await self.daemon.stop()

    @property
    def port(self) -> int:
        """The port of the client listener."""
        return int(self.daemon.clients.port)

    @property
    def url(self) -> str:
        """The base URL for SDKs of the OpenAI API."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def client(self, **options: Any) -> RawClient:
        """Connect a raw client; options as of `RawClient.connect`."""
        client = await RawClient.connect(self.port, **options)
        self._clients.append(client)
        return client

    async def close_clients(self) -> None:
        """Close every client that `client` made."""
        while self._clients:
            await self._clients.pop().close()

    def headers(self, headers: Fields = (), key: str | None = TEAM_A) -> list[tuple[str, str]]:
        """Return the header fields of a call with a key (None: without one)."""
        pairs = [("content-type", "application/json")]
        if key is not None:
            pairs.append(("authorization", f"Bearer {key}"))
        given = list(headers.items() if isinstance(headers, Mapping) else headers)
        names = {name.lower() for name, _ in given}
        return [pair for pair in pairs if pair[0] not in names] + given

    async def send(
        self,
        path: str = "/v1/responses",
        body: Mapping[str, Any] | bytes | None = None,
        headers: Fields = (),
        *,
        key: str | None = TEAM_A,
        **options: Any,
    ) -> RawClient:
        """Send a POST on a new connection and leave its answer to be read by the test."""
        body = prompt(path) if body is None else body
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = await self.client(**options)
        await client.request("POST", path, self.headers(headers, key), payload)
        return client

    async def post(
        self,
        path: str = "/v1/responses",
        body: Mapping[str, Any] | bytes | None = None,
        headers: Fields = (),
        *,
        key: str | None = TEAM_A,
    ) -> Answer:
        """POST on a connection of its own; return the whole answer."""
        client = await self.send(path, body, headers, key=key)
        return await self._answer(client)

    async def get(self, path: str, headers: Fields = (), *, key: str | None = TEAM_A) -> Answer:
        """GET on a connection of its own; return the whole answer."""
        client = await self.client()
        await client.request("GET", path, self.headers(headers, key))
        return await self._answer(client)

    async def admin(self, path: str, method: str = "GET", body: bytes | None = None) -> Answer:
        """Ask the admin listener."""
        async with await RawClient.connect(int(self.daemon.operators.port)) as client:
            await client.request(method, path, (), body)
            return await client.answer()

    def calm(self) -> None:
        """Let no upstream be left alone any more, whatever it has refused."""
        proxy = self.daemon._proxy
        for upstream in proxy.snapshot.config.upstreams.values():
            proxy.standings.of(upstream).breaker.succeeded(probe=True)

    async def _answer(self, client: RawClient) -> Answer:
        try:
            return await client.answer()
        finally:
            self._clients.remove(client)
            await client.close()

    async def metrics(self) -> Metrics:
        """Return every sample, by name and labels."""
        return parse_metrics((await self.admin("/metrics")).body.decode())

    def logs(self) -> list[dict[str, Any]]:
        """Return the log so far."""
        return self.tap.lines()

    def request_logs(self) -> list[dict[str, Any]]:
        """Return the lines of requests alone."""
        return [line for line in self.logs() if line.get("event") == "request"]

    def openai(self, **options: Any) -> AsyncOpenAI:
        """Make the SDK's client; the test closes it (`async with`)."""
        given = {"base_url": self.url, "api_key": self.key, "max_retries": 0, **options}
        return AsyncOpenAI(**given)

    def anthropic(self, **options: Any) -> AsyncAnthropic:
        """Make the SDK's client; the test closes it (`async with`)."""
        base = self.url.removesuffix("/v1")
        given = {"base_url": base, "api_key": self.key, "max_retries": 0, **options}
        return AsyncAnthropic(**given)


def parse_metrics(text: str) -> Metrics:
    """Read the exposition format of Prometheus."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def totals(metrics: Metrics, name: str, by: str) -> dict[str, float]:
    """Add up the samples of one metric by the value of one label; zeros are left out."""
    found: Counter[str] = Counter()
    for (sample, labels), value in metrics.items():
        if sample == name:
            found[dict(labels).get(by, "")] += cast("int", value)
    return {label: value for label, value in found.items() if value}
