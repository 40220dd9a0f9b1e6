"""The real daemon before several scripted upstreams, the targets of one route `gpt-test`."""

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import faults
from answers import sse
from client import Answer, parse_sse
from faults import STREAMED, Api, Seen, asked, events_of, json_of
from invariants import Baseline, check_invariants, eventually, take_baseline
from responses import responses_events
from rig import ABSENT, Proxy, config_text
from steps import (
    SSE_HEADERS,
    Chunk,
    EndChunks,
    Headers,
    Step,
    error_answer,
    json_answer,
    stream,
)
from upstream import ScriptedUpstream

if TYPE_CHECKING:
    from client import RawClient
    from upstream import Recorded

Script = Sequence[Step]
Attempts = dict[tuple[str, str], int]

NEVER = {"failures": 1_000_000, "cooldown": "1min", "max_cooldown": "1min"}
ALL: tuple[Api, ...] = (*STREAMED, "embeddings")
WAYS: list[tuple[Api, bool]] = [
    *((api, streamed) for api in STREAMED for streamed in (False, True)),
    ("embeddings", False),
]
TOLD = {
    "upstream left alone",
    "upstream probed",
    "upstream available again",
    "upstream refuses our credential",
}
LIFECYCLE = responses_events()[:2]


class Group:
    """Several upstreams as one: what `invariants` asks of an upstream."""

    def __init__(self, members: Sequence[ScriptedUpstream]) -> None:
        self._members = members

    @property
    def connections(self) -> int:
        """All that are open."""
        return sum(member.connections for member in self._members)

    @property
    def text(self) -> str:
        """What they say."""
        return self._members[0].text

    @text.setter
    def text(self, text: str) -> None:
        for member in self._members:
            member.text = text

    def heal(self) -> None:
        """Heal each."""
        for member in self._members:
            member.heal()


class Rig:
    """A daemon and its targets by name. Make it with `targets`."""

    def __init__(self, proxy: Proxy, servers: Mapping[str, ScriptedUpstream]) -> None:
        self.proxy = proxy
        self.servers = dict(servers)
        self.group = cast("ScriptedUpstream", Group(list(servers.values())))
        self.baseline: Baseline | None = None
        self._before: Attempts = {}

    def __getitem__(self, name: str) -> ScriptedUpstream:
        return self.servers[name]

    async def rest(self) -> None:
        """Warm up, note what is held at rest, and forget what was asked so far."""
        self.baseline = await take_baseline(self.proxy, self.group)
        for server in self.servers.values():
            server.requests.clear()
        self._before = await self._attempts()

    @property
    def got(self) -> dict[str, int]:
        """How many requests came to each that was asked at all."""
        return {name: len(s.requests) for name, s in self.servers.items() if s.requests}

    async def _attempts(self) -> Attempts:
        found: Counter[tuple[str, str]] = Counter()
        for (name, labels), value in (await self.proxy.metrics()).items():
            if name == "aiproxy_upstream_attempts_total":
                facts = dict(labels)
                found[facts["upstream"], facts["result"]] += int(value)
        return dict(found)

    async def attempts(self) -> Attempts:
        """What was counted of attempts since `rest`: by upstream and result, without zeros."""
        now = await self._attempts()
        changed = {key: value - self._before.get(key, 0) for key, value in now.items()}
        return {key: value for key, value in changed.items() if value}

    async def available(self) -> dict[str, float]:
        """The gauge of each upstream."""
        return {
            dict(labels)["upstream"]: value
            for (name, labels), value in (await self.proxy.metrics()).items()
            if name == "aiproxy_upstream_available"
        }

    async def states(self) -> dict[str, str]:
        """What the status page says of each upstream."""
        status = (await self.proxy.admin("/-/status")).json()
        return {each["name"]: each["state"] for each in status["upstreams"]}

    def told(self, upstream: str) -> list[str]:
        """The log's lines about how an upstream stands."""
        return [
            line["event"]
            for line in self.proxy.logs()
            if line.get("event") in TOLD and line.get("upstream") == upstream
        ]

    async def ask(self, api: Api = "responses", *, streamed: bool = False, **fields: Any) -> Seen:
        """Make a request and read its whole answer; how as of `faults.ask`."""
        seen = await faults.ask(self.proxy, api, streamed=streamed, fields=fields)
        await seen.client.close()
        return seen

    async def begin(
        self, api: Api = "responses", *, streamed: bool = False, **fields: Any
    ) -> "RawClient":
        """Make a request and leave its answer to the test."""
        return await self.proxy.send(faults.PATHS[api], asked(api, streamed=streamed, **fields))

    async def lines(self, count: int) -> list[dict[str, Any]]:
        """Return the last request lines of the log, once `count` of them are there."""
        found: list[dict[str, Any]] = []

        async def written() -> None:
            found[:] = self.proxy.request_logs()
            assert len(found) >= count

        await eventually(written)
        return found[-count:]

    async def reload(self, text: str) -> None:
        """Take another configuration, which must be a good one."""
        self.proxy.text = text
        answer = await self.proxy.admin("/-/reload", "POST")
        assert answer.status == 200, answer

    def calm(self) -> None:
        """Let no upstream be left alone any more."""
        self.proxy.calm()

    async def check(self, *bodies: bytes, **options: Any) -> None:
        """Assert the invariants, with all targets healed; `bodies` are of errors."""
        await self.proxy.close_clients()
        self.calm()

        async def none_in_flight() -> None:
            proxy = self.proxy.daemon._proxy
            upstreams = proxy.snapshot.config.upstreams.values()
            assert [proxy.standings.of(each).in_flight for each in upstreams] == [0] * len(
                upstreams
            )

        await eventually(none_in_flight)
        await check_invariants(
            self.proxy, self.group, baseline=self.baseline, bodies=bodies, **options
        )


async def cooled(rig: Rig, name: str = "a") -> None:
    """Wait until the cooldown of an upstream that is left alone has passed."""

    async def holds() -> None:
        breaker = rig.proxy.daemon._proxy.standings._known[name][1].breaker
        assert breaker.state == "open"
        assert breaker.wait(time.monotonic()) == 0.0

    await eventually(holds)


async def nothing_held(rig: Rig) -> None:
    """Assert that no byte of a request is counted as in memory."""

    async def holds() -> None:
        assert rig.proxy.daemon._proxy.held == 0

    await eventually(holds)


def config(
    urls: Mapping[str, str],
    *,
    each: Mapping[str, Mapping[str, Any]] | None = None,
    pools: Sequence[Any] | None = None,
    route: Mapping[str, Any] | None = None,
    **changes: Any,
) -> str:
    """Return the configuration of a route `gpt-test` over these upstreams.

    Args:
        urls: of the upstreams, by name.
        each: more facts of upstreams, by name.
        pools: the targets of the route; by default each upstream in a tier of its own.
        route: more facts of the route.
        changes: as of `config_text`.
    """
    upstreams: dict[str, Any] = {"scripted": ABSENT}
    for name, url in urls.items():
        upstreams[name] = {
            "url": url,
            "credential": {"env": "UPSTREAM_KEY"},
            "apis": ["responses", "chat", "messages", "embeddings"],
            "idle_connections": "50ms",
            **((each or {}).get(name, {})),
        }
    tiers = [{"name": name, "tier": tier} for tier, name in enumerate(urls, 1)]
    listed = tiers if pools is None else list(pools)
    routes = [{"model": "gpt-test", "upstreams": listed, **(route or {})}]
    given: dict[str, Any] = {"retries": 2, "breaker": NEVER, "routes": routes, **changes}
    return config_text("http://unused.invalid", upstreams=upstreams, **given)


@contextlib.asynccontextmanager
async def targets(
    names: str = "ab", elsewhere: Mapping[str, str] | None = None, **options: Any
) -> AsyncIterator[Rig]:
    """Run a daemon before upstreams of these names of one letter, in this order.

    `elsewhere` gives addresses to some of them, which then are no servers; `options` as of
    `config`. Each server says `from NAME`.
    """
    async with contextlib.AsyncExitStack() as stack:
        servers: dict[str, ScriptedUpstream] = {}
        urls: dict[str, str] = {}
        for name in names:
            if name in (elsewhere or {}):
                urls[name] = (elsewhere or {})[name]
                continue
            servers[name] = await stack.enter_async_context(ScriptedUpstream())
            servers[name].text = f"from {name}"
            urls[name] = servers[name].url
        proxy = await Proxy.start(config(urls, **options))
        try:
            yield Rig(proxy, servers)
        finally:
            await proxy.stop()


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """Give an address at which connections are refused, for as long as it is held."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


@contextlib.asynccontextmanager
async def unfinished() -> AsyncIterator[str]:
    """Give an address at which no connection comes about: TLS is never answered."""
    held: list[asyncio.StreamWriter] = []

    async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await asyncio.Future()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for writer in held:
            writer.close()


def refusal(status: int, *headers: tuple[str, str]) -> Script:
    """Refuse with a status."""
    return error_answer(status, f"scripted {status}", headers=headers)


def said(api: Api, answer: Answer) -> str:
    """Return the text of an answer: whole, or put together from a stream."""
    assert answer.status == 200, answer
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return _text(api, answer.json())
    facts = [json.loads(data) for _, data in parse_sse(answer.body) if data != "[DONE]"]
    match api:
        case "responses":
            kind = "response.output_text.delta"
            return "".join(fact["delta"] for fact in facts if fact["type"] == kind)
        case "chat":
            choices = [choice for fact in facts for choice in fact.get("choices", [])]
            return "".join(choice["delta"].get("content") or "" for choice in choices)
        case _:
            return "".join(fact.get("delta", {}).get("text", "") for fact in facts)


def _text(api: Api, document: Mapping[str, Any]) -> str:
    match api:
        case "responses":
            items = [item for item in document["output"] if item["type"] == "message"]
            return "".join(part["text"] for item in items for part in item["content"])
        case "chat":
            return str(document["choices"][0]["message"]["content"])
        case "messages":
            return "".join(part["text"] for part in document["content"])
        case _:
            return ""


def frames(*events: bytes, end: Step | None = None) -> Script:
    """Send these events as a stream, a chunk each, and end in a way; None: properly."""
    body = [Chunk(event) for event in events]
    return [Headers(200, SSE_HEADERS), *body, EndChunks() if end is None else end]


def healthy(api: Api, *, streamed: bool, text: str) -> Script:
    """Answer well."""
    return stream(events_of(api, text)) if streamed else json_answer(json_of(api, text))


def error_event(number: int) -> bytes:
    """An `error` event of the Responses API."""
    fact = {"type": "error", "code": "x", "message": "GPU fell off", "param": None}
    return sse({**fact, "sequence_number": number}, event="error")


def failed_events() -> list[bytes]:
    """A stream that the upstream itself says has failed, before any output."""
    error = {"code": "server_error", "message": "The GPU is on fire."}
    return responses_events(items=[], usage=None, terminal="failed", error=error)


def items_sent(request: "Recorded") -> list[Any]:
    """Return the input of a request to a Responses upstream, as items."""
    given = request.json()["input"]
    return given if isinstance(given, list) else [given]
