"""Faults F27 to F30 and F32: reloads under load, of bad files, of keys and routes in use.

What was under way ends as it began; nothing is left behind.
"""
# ruff: noqa: E501 - a case is one line, as a mistake is

import asyncio
import contextlib
import gc
import itertools
import json
import os
import re
import signal
import socket
import sys
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from client import Answer, RawClient
from faults import PATHS, STREAMED, Api, Serve, asked, begin, events_of
from invariants import check_invariants, check_terminal, eventually
from rig import (
    ABSENT,
    CREDENTIAL,
    TEAM_A,
    TEAM_B,
    Proxy,
    config_text,
    key_hash,
    parse_metrics,
    prompt,
    routes,
    totals,
)
from upstream import Chunk, EndChunks, Headers, Recorded, ScriptedUpstream, Wait

if TYPE_CHECKING:
    from aiproxy.snapshot import Snapshot

SSE = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
ROOT = Path(__file__).resolve().parent.parent
OK = ("aiproxy_config_last_reload_successful", frozenset[tuple[str, str]]())
OTHER = "sk-other-credential-5521-ZxCvBn"


async def reload(proxy: Proxy, text: str) -> Any:
    """Reload another text, which is good; return what changed."""
    proxy.text = text
    answer = await proxy.admin("/-/reload", "POST")
    assert answer.status == 200, answer
    return answer.json()["changes"]


class Streams:
    """Open streams of each API, held after their first event until `go_on`."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.open: list[tuple[Api, RawClient, bytes]] = []

    async def begin(self, proxy: Proxy, upstream: ScriptedUpstream, api: Api, **by: Any) -> None:
        """Open one more, and read its head."""
        frames = events_of(api)
        upstream.script(Headers(200, SSE), Chunk(frames[0]), Wait(self.go_on),
                        *map(Chunk, frames[1:]), EndChunks())  # fmt: skip
        before = len(upstream.requests)
        client = await proxy.send(PATHS[api], asked(api, streamed=True), **by)
        await upstream.wait_request(before + 1)
        assert (await client.read_head()).status == 200
        self.open.append((api, client, b"".join(frames)))

    async def check_whole(self) -> None:
        """Let them go on; each comes to its end, byte for byte."""
        self.go_on.set()
        for api, client, expected in self.open:
            async with asyncio.timeout(5):
                body = await client.read_body()
            assert body == expected
            if api == "responses":
                check_terminal(body, completed=True)


# F27


async def test_f27_a_hundred_reloads_under_load(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams opened before and between them all come whole, and no other request fails.

    A configuration lives as long as what began under it, and only the last one stays.
    """
    proxy, baseline = await begin(serve, upstream)
    served_by = proxy.daemon._proxy
    configurations = weakref.WeakSet([served_by.snapshot])
    put = served_by.put

    def count(snapshot: "Snapshot") -> None:
        configurations.add(snapshot)
        put(snapshot)

    monkeypatch.setattr(served_by, "put", count)
    idle = {"idle_connections": "50ms"}
    ways = itertools.cycle([
        {**idle, "timeouts": {"idle": "77s"}, "headers": {"X-Turn": "one"}},
        {**idle, "timeouts": {"idle": "88s"}, "headers": {"X-Turn": "two"}},
    ])  # fmt: skip
    streams, ended, served = Streams(), asyncio.Event(), 0

    async def load() -> None:
        nonlocal served
        while not ended.is_set():
            answer = await proxy.post()
            assert answer.status == 200, answer
            served += 1

    for api in STREAMED:
        await streams.begin(proxy, upstream, api)
    for number in range(100):
        if number % 10 == 5:  # no one else may take its script
            await streams.begin(proxy, upstream, STREAMED[number // 10 % 3])
        workers = [asyncio.create_task(load()) for _ in range(2)]
        ended.clear()
        text = config_text(upstream.url, upstreams={"scripted": next(ways)})
        changed = await reload(proxy, text)
        assert changed["upstreams"]["changed"] == ["scripted"]
        ended.set()
        await asyncio.gather(*workers)
    turns = {request.header("x-turn") for request in upstream.requests}
    assert turns == {None, "one", "two"}
    assert served >= 200
    assert len(streams.open) == 13
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_requests_in_flight", "endpoint") == {
        "responses": 5, "chat": 4, "messages": 4,
    }  # fmt: skip
    gc.collect()
    assert 10 <= len(configurations) <= 11 + 1  # of the first streams, of ten more, the last one
    await streams.check_whole()
    assert set(totals(await proxy.metrics(), "aiproxy_requests_total", "outcome")) == {"completed"}
    await check_invariants(proxy, upstream, baseline=baseline)
    gc.collect()
    assert list(configurations) == [served_by.snapshot]


# F28

HASH = "a" * 64
REFUSED: dict[str, tuple[str, list[str]]] = {
    "no YAML": ("a: [b\n", ["2:1: not valid YAML: a '[' that is never closed, or a comma missing"]),
    "a control character": ("ok: 1\nb: \x01\n", ["2:4: not valid YAML: the control character U+0001"]),
    "an alias": ("@\ntrusted_proxies: [*-x]\n", ['trusted_proxies[0]: an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"']),
    "a key twice": ("@\nroutes: []\n", ["routes: this key is already on line"]),
    "unknown key": ("@\nlisen: x\n", ["lisen: unknown key (did you mean 'listen'?)"]),
    "wrong unit": ("@\nmax_body: 5MB\n", ["max_body: must be a size such as 64KiB, 32MiB or 1GiB, not '5MB'"]),
    "literal key": (f"@\nkeys_default: {{limits: x}}\nretries: 11\nmax_connections: 0\nsha: {HASH}\n", [
        "keys_default.limits: must be a mapping, not text", "retries: must be at most 10, not 11",
        "max_connections: must be at least 1, not 0", "sha: unknown key"]),
    "not yet": ("@\nlimiter: {on_error: deny}\n", ["limiter.on_error: not supported yet: only the default, degrade, is accepted"]),
    "clash": ("@\nmax_connections: many\n", ["max_connections: must be a whole number, not 'many'"]),
    "no upstream": (f"upstreams: {{u: {{url: 'http://h', apis: [chat]}}}}\nroutes: [{{model: m, upstreams: [x]}}]\nkeys: {{k: {{sha256: {HASH}, models: [n]}}}}\n", [
        "2:33: routes[0].upstreams[0]: no upstream 'x'", "3:95: keys.k.models[0]: matches no route"]),
    "no secret": ("upstreams: {u: {url: 'http://h', apis: [chat], credential: {env: NOPE}}}\nroutes: [{model: m, upstreams: [u]}]\n", [
        "1:66: upstreams.u.credential.env: environment variable NOPE is not set"]),
    "literal secret": (f"upstreams: {{u: {{url: 'http://h', apis: [chat], credential: {OTHER}}}}}\nroutes: [{{model: m, upstreams: [u]}}]\n", [
        "1:60: upstreams.u.credential: must be {env: NAME} or {file: PATH}: a literal secret is never accepted"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_f28_a_bad_file_changes_nothing(
    serve: Serve, upstream: ScriptedUpstream, name: str
) -> None:
    """Every mistake is told with its place, the old one serves, and the next good file heals."""
    proxy = await serve()
    good, streams = proxy.text, Streams()
    await streams.begin(proxy, upstream, "responses")
    before = (await proxy.admin("/-/config")).body
    text, expected = REFUSED[name]
    proxy.text = text.replace("@", re.sub(r'"retries": 0\n', "", good))
    answer = await proxy.admin("/-/reload", "POST")
    assert answer.status == 400
    sentences = answer.json()["error"]["message"].split("\n")
    assert len(sentences) == len(expected)
    for sentence in sentences:
        file, line, column, _ = sentence.split(":", 3)
        assert (file, line.isdigit(), column.isdigit()) == ("test.yaml", True, True)
        assert any(mistake in sentence for mistake in expected), sentence
    assert (await proxy.metrics())[OK] == 0
    assert (await proxy.admin("/-/config")).body == before
    assert (await proxy.post()).status == 200
    await streams.check_whole()
    await reload(proxy, config_text(upstream.url, max_body="1MiB"))
    assert (await proxy.metrics())[OK] == 1
    await check_invariants(proxy, upstream, bodies=[answer.body])
    assert OTHER.encode() not in answer.body + proxy.tap.raw


# F29

REVOKED: dict[str, dict[str, Any]] = {
    "removed": {"team-a": ABSENT},
    "disabled": {"team-a": {"disabled": True}},
    "expired": {"team-a": {"expires": "2020-01-01"}},
    "replaced": {"team-a": {"sha256": key_hash("sk-aip-another")}},
}


@pytest.mark.parametrize("way", REVOKED)
async def test_f29_a_revoked_key(serve: Serve, upstream: ScriptedUpstream, way: str) -> None:
    """It is 401 from then on, on an open connection too; its open stream goes on to its end."""
    proxy, streams = await serve(), Streams()
    kept = await proxy.client()
    body = json.dumps(prompt()).encode()
    await kept.request("POST", PATHS["responses"], proxy.headers(), body)
    assert (await kept.answer()).status == 200
    for api in STREAMED:
        await streams.begin(proxy, upstream, api)
    asked_before = len(upstream.requests)
    await reload(proxy, config_text(upstream.url, keys=REVOKED[way]))
    await kept.request("POST", PATHS["responses"], proxy.headers(), body)
    answer = await kept.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await proxy.post(PATHS["chat"])).status == 401
    assert (await proxy.get("/v1/models")).status == 401
    assert len(upstream.requests) == asked_before
    assert (await proxy.post(key=TEAM_B)).status == 200
    await streams.check_whole()
    lines = [line for line in proxy.request_logs() if line["key"] == "team-a"]
    assert {line["outcome"] for line in lines} == {"completed"}
    await reload(proxy, config_text(upstream.url))
    await check_invariants(proxy, upstream, bodies=[answer.body])


# F30


async def test_f30_a_route_moves_during_a_stream(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Old streams stay where they are, new requests go on, no credential goes to the other host."""
    async with ScriptedUpstream() as other:
        credential = {"credential": {"env": "OTHER_KEY"}}
        stanza = {
            "url": other.url,
            "apis": ["responses", "chat", "messages"],
            "sessions": "upstream",
        } | credential
        proxy, streams = await serve({"OTHER_KEY": OTHER}), Streams()
        same_name = config_text(upstream.url, upstreams={"scripted": stanza})
        moved = config_text(upstream.url, upstreams={"other": stanza},
                            routes=routes(upstreams=["other"]))  # fmt: skip
        for number, text in enumerate([same_name, proxy.text, moved, proxy.text, moved]):
            here = upstream if number % 2 == 0 else other
            for api in STREAMED:
                await streams.begin(proxy, here, api)
            await reload(proxy, text)
            for api in STREAMED:
                answer = await proxy.post(PATHS[api], asked(api, streamed=False))
                assert answer.status == 200
        assert [len(it.requests) for it in (upstream, other)] == [9 + 6, 6 + 9]
        await streams.check_whole()
        for host, own, foreign in ((upstream, CREDENTIAL, OTHER), (other, OTHER, CREDENTIAL)):
            for request in host.requests:
                said = secrets_of(request)
                assert own in said
                assert foreign not in said
        assert OTHER.encode() not in proxy.tap.raw
        await reload(proxy, config_text(upstream.url))
        await check_invariants(proxy, upstream)
        await proxy.stop()


def secrets_of(request: Recorded) -> str:
    """Return all of a request in which a secret may stand."""
    return repr((request.target, request.headers, request.body))


# The real process


@dataclass
class Running:
    """A process of `aiproxy serve`, and where it is."""

    process: asyncio.subprocess.Process
    file: Path
    port: int
    admin: int
    errors: asyncio.StreamReader

    async def ask(self, port: int, method: str, path: str, body: bytes | None = None) -> Answer:
        """Ask one of its listeners."""
        fields = [("content-type", "application/json"), ("authorization", f"Bearer {TEAM_A}")]
        async with asyncio.timeout(5), await RawClient.connect(port) as client:
            await client.request(method, path, fields, body)
            return await client.answer()

    async def post(self) -> int:
        """Make a request; return its status."""
        return (
            await self.ask(self.port, "POST", "/v1/responses", json.dumps(prompt()).encode())
        ).status

    async def dropped(self) -> float:
        """Return how many log lines were dropped."""
        metrics = parse_metrics((await self.ask(self.admin, "GET", "/metrics")).body.decode())
        return metrics["aiproxy_log_dropped_total", frozenset()]

    async def logged(self, event: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Read its log up to an event; return that line and those before it."""
        before: list[dict[str, Any]] = []
        async with asyncio.timeout(10):
            while True:
                raw = await self.errors.readline()
                assert raw, "it ended"
                line = json.loads(raw)
                if line["event"] == event:
                    return line, before
                before.append(line)


@contextlib.asynccontextmanager
async def running(upstream: ScriptedUpstream, folder: Path) -> AsyncIterator[Running]:
    """Run `aiproxy serve` with `--admin`; its standard error is a pipe that the test reads."""
    with socket.socket() as one, socket.socket() as two:
        for sock in (one, two):
            sock.bind(("127.0.0.1", 0))
        port, admin = one.getsockname()[1], two.getsockname()[1]
    file = folder / "aiproxy.yaml"
    file.write_text(config_text(upstream.url, listen=f"127.0.0.1:{port}"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiproxy", "serve", "--config", str(file)),
        *("--admin", f"127.0.0.1:{admin}"),
        cwd=ROOT,
        env={**os.environ, "UPSTREAM_KEY": CREDENTIAL},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    found = Running(process, file, port, admin, process.stderr)
    try:
        await found.logged("started")
        yield found
    finally:
        if process.returncode is None:
            process.kill()
        await process.stderr.read()
        await process.wait()


async def test_sighup_is_a_reload(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """A real file is read again at each SIGHUP; `--admin` stays; in the drain it does nothing."""
    async with running(upstream, tmp_path) as daemon:
        listen = f"127.0.0.1:{daemon.port}"
        text = config_text(upstream.url, listen=listen, routes=routes()[:2], admin="unix:/x")
        daemon.file.write_text(text)
        daemon.process.send_signal(signal.SIGHUP)
        line, before = await daemon.logged("reloaded")
        assert (line["routes_removed"], "restart" in line) == (["org/*"], False)
        assert {it["event"] for it in before} == {"configuration"}
        daemon.file.write_text("lisen: x\nroutes: []\n")
        daemon.process.send_signal(signal.SIGHUP)
        line, before = await daemon.logged("reload failed")
        assert line["mistakes"] == len(before) == 3
        assert all(it["mistake"].startswith(f"{daemon.file}:") for it in before)
        assert await daemon.post() == 200
        report = (await daemon.ask(daemon.admin, "GET", "/-/status")).json()
        assert report["configuration"]["last_reload_failed"]
        daemon.file.write_text(text.replace("org", "gro"))
        for _ in range(20):
            daemon.process.send_signal(signal.SIGHUP)
        await daemon.logged("reloaded")
        streams, frames = Streams(), events_of("responses")
        upstream.script(Headers(200, SSE), Chunk(frames[0]), Wait(streams.go_on),
                        *map(Chunk, frames[1:]), EndChunks())  # fmt: skip
        client = await RawClient.connect(daemon.port)
        body = json.dumps(prompt(stream=True)).encode()
        await client.request("POST", "/v1/responses", {"x-api-key": TEAM_A}, body)
        await client.read_head()
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.logged("draining")
        for _ in range(3):
            daemon.process.send_signal(signal.SIGHUP)
        assert (await daemon.ask(daemon.admin, "POST", "/-/reload")).status == 503
        streams.go_on.set()
        assert await client.read_body() == b"".join(frames)
        await client.close()
        _, before = await daemon.logged("stopped")
        assert {it["event"] for it in before} == {"request", "drained 1, cut 0"}
        async with asyncio.timeout(5):
            assert await daemon.process.wait() == 0


async def test_f32_standard_error_is_blocked(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """With a pipe that nobody reads requests and reloads go on, lines are dropped and counted."""
    async with running(upstream, tmp_path) as daemon:
        good = daemon.file.read_text()
        daemon.file.write_text("".join(f"wrong{number}: 1\n" for number in range(4000)))
        for _ in range(12):
            assert (await daemon.ask(daemon.admin, "POST", "/-/reload")).status == 400
            if await daemon.dropped():
                break
        dropped = await daemon.dropped()
        assert dropped > 0
        for _ in range(5):
            assert await daemon.post() == 200
        assert await daemon.dropped() == dropped + 5
        daemon.file.write_text(good.replace('"gpt-test"', '"gpt-other"'))
        done = await daemon.ask(daemon.admin, "POST", "/-/reload")
        assert done.json()["changes"]["routes"]["added"] == ["gpt-other"]
        assert await daemon.post() == 404
        lost = await daemon.dropped()
        await daemon.logged("reload failed")  # somebody reads again

        async def recovered() -> None:
            assert await daemon.post() == 404
            assert await daemon.dropped() == lost

        reading = asyncio.create_task(daemon.logged("request"))
        await eventually(recovered, 5)
        assert (await reading)[0]["status"] == 404
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.logged("stopped")
