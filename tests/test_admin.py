"""The admin listener: what is at its paths, who may have it, and what it says of the daemon."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aiproxy
from aiproxy.config import Address
from aiproxy.listener import Connection
from aiproxy.sockets import Entrance
from client import Answer, RawClient
from faults import Serve
from invariants import check_secrets, eventually
from rig import TEAM_B, Proxy, config_text, key_hash, routes, totals
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

SSE = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
READ = ["/metrics", "/-/healthy", "/-/ready", "/-/config", "/-/status", "/"]
PUBLIC = {"/metrics", "/-/healthy", "/-/ready"}
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]
UNKNOWN = ["/-/", "/-/config/", "/metrics/", "/favicon.ico", "/v1/models", "/-/reload/x", "//"]


def expected(path: str, method: str) -> tuple[int, str | None]:
    """Return the status and the Allow header of section 4."""
    allowed = ["POST"] if path == "/-/reload" else ["GET", "HEAD"]
    if path in UNKNOWN:
        return 404, None
    return (200, None) if method in allowed else (405, ", ".join(allowed))


def check_refused(answer: Answer, status: int, code: str) -> None:
    """Assert that this is an error in the shape of the API, with all four keys."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, code)
    assert error["message"]


@pytest.mark.parametrize("path", [*READ, "/-/reload", *UNKNOWN])
async def test_paths_and_methods(serve: Serve, path: str) -> None:
    """Each path has its methods; another one is 405 with `Allow`, another path 404."""
    proxy = await serve()
    for method in METHODS:
        answer = await proxy.admin(path, method)
        status, allow = expected(path, method)
        assert (answer.status, answer.headers.get("allow")) == (status, allow), method
        assert answer.headers["x-request-id"]
        if method == "HEAD":
            assert answer.body == b""
        elif status != 200:
            code = {404: "unknown_url", 405: "method_not_allowed"}[status]
            check_refused(answer, status, code)
    assert (await proxy.admin(f"{path}?a=b")).status == expected(path, "GET")[0]


TEXT, JSON = ["text/plain; "] * 3, ["application/json"] * 2
TYPES = dict(zip(READ, [*TEXT, *JSON, "text/html; charset=utf-8"], strict=True))


@pytest.mark.parametrize("path", READ)
async def test_what_is_read_is_of_its_kind_and_of_this_moment(serve: Serve, path: str) -> None:
    """Nothing is kept by a cache or shown within another page, and HEAD has GET's headers."""
    proxy = await serve()
    got, head = await proxy.admin(path), await proxy.admin(path, "HEAD")
    assert got.headers["content-type"].startswith(TYPES[path])
    assert got.headers["cache-control"] == "no-store"
    assert got.headers["x-frame-options"] == "DENY"
    assert got.headers.keys() == head.headers.keys()
    if path in ("/-/healthy", "/-/config", "/-/ready"):
        assert head.headers["content-length"] == str(len(got.body))


# Who may have what


@contextmanager
def peer(name: Any) -> Iterator[None]:
    """Let whoever connects be at this address."""
    fixed = property(lambda _connection: name, lambda _connection, _name: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "peername", fixed)
        yield


# fmt: off
LOCAL: list[Any] = [
    ("127.0.0.1", 5000), ("127.8.9.1", 5000), ("::1", 5000, 0, 0),
    ("::ffff:127.0.0.1", 5000, 0, 0), "",
]
REMOTE: list[Any] = [
    ("192.0.2.7", 5000), ("10.0.0.1", 5000), ("::ffff:192.0.2.7", 5000, 0, 0), ("", 5000),
    ("fe80::1%eth0", 5000, 0, 2), ("2001:db8::1", 5000, 0, 0), ("::127.0.0.1", 5000, 0, 0),
]
# fmt: on


@pytest.mark.parametrize("name", LOCAL, ids=lambda name: name[0] if name else "unix")
async def test_this_machine_may_have_all(serve: Serve, name: Any) -> None:
    """Loopback of both families, mapped too, and a unix socket are let in everywhere."""
    proxy = await serve()
    with peer(name):
        found = {path: (await proxy.admin(path)).status for path in READ}
        assert found == dict.fromkeys(READ, 200)
        assert (await proxy.admin("/-/reload", "POST")).status == 200
        assert (await proxy.admin("/x")).status == 404


@pytest.mark.parametrize("name", REMOTE, ids=lambda name: str(name[0]))
async def test_another_machine_has_metrics_and_health_alone(serve: Serve, name: Any) -> None:
    """All else is 403, whatever the path or the method, and nothing is done or told."""
    proxy = await serve()
    loaded = (await proxy.admin("/-/status")).json()["configuration"]["loaded"]
    with peer(name):
        for path in [*READ, "/-/reload", *UNKNOWN]:
            for method in METHODS:
                answer = await proxy.admin(path, method)
                if path in PUBLIC:
                    assert answer.status == expected(path, method)[0]
                    continue
                assert (answer.status, answer.headers.get("allow")) == (403, None), (path, method)
                if method != "HEAD":
                    check_refused(answer, 403, "forbidden")
    assert (await proxy.admin("/-/status")).json()["configuration"]["loaded"] == loaded
    assert not [line for line in proxy.logs() if line["event"] == "reloaded"]


async def test_a_unix_socket_is_let_in(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """Whoever may open the socket's file may have all of it."""
    path = tmp_path / "admin.sock"
    proxy = await Proxy.start(config_text(upstream.url, admin=f"unix:{path}"))
    try:
        for target, method in (("/-/status", "GET"), ("/-/reload", "POST"), ("/", "GET")):
            reader, writer = await asyncio.open_unix_connection(path)
            async with RawClient(reader, writer) as client:
                await client.request(method, target, {"host": "localhost"})
                assert (await client.answer()).status == 200
    finally:
        await proxy.stop()


# fmt: off
HOSTS: list[tuple[list[str], int]] = [
    (["127.0.0.1"], 200), (["127.0.0.1:9090"], 200), (["[::1]"], 200), (["[::1]:9090"], 200),
    (["192.0.2.1"], 200), (["localhost"], 200), (["localhost:9090"], 200), (["LOCALHOST:1"], 200),
    (["LocalHost"], 200), (["proxy.test"], 200), (["Proxy.Test:9090"], 200),
    (["evil.example"], 403), (["127.0.0.1.evil.example"], 403), (["localhost.evil.example"], 403),
    (["evil.example:9090"], 403), (["localhost."], 403), (["evil.example."], 403), ([""], 403),
    (["proxy.test.evil.example"], 403), (["xproxy.test"], 403), ([], 403),
    # What is no host at all is no HTTP (RFC 9112 section 3.2).
    (["127.0.0.1@evil.example"], 400), (["1.2.3.4@evil"], 400), (["::1"], 400), (["[::1"], 400),
    (["127.0.0.1:9090@evil"], 400), (["localhost:evil.example"], 400), (["[::1]evil.example"], 400),
    (["127.0.0.1, evil.example"], 400), (["evil.example 127.0.0.1"], 400),
    (["127.0.0.1", "evil.example"], 400), (["127.0.0.1", "127.0.0.1"], 400),
]
# fmt: on


@pytest.fixture
async def named(upstream: ScriptedUpstream) -> AsyncIterator[Proxy]:
    """Run a daemon whose `admin` has a name, without a resolver that knows it."""
    opened = Entrance.open

    async def by_address(self: Entrance, address: Address, *passed: Any) -> None:
        await opened(self, replace(address, host="127.0.0.1"), *passed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Entrance, "open", by_address)
        proxy = await Proxy.start(config_text(upstream.url, admin="Proxy.test:0"))
    yield proxy
    await proxy.stop()


@pytest.mark.parametrize(("hosts", "status"), HOSTS, ids=[" + ".join(h) or "-" for h, _ in HOSTS])
async def test_a_reload_is_asked_for_under_our_own_name(
    named: Proxy, hosts: list[str], status: int
) -> None:
    """A Host that is no address, not localhost and not the configured one is refused."""
    fields = "".join(f"host: {host}\r\n" for host in hosts)
    version = "1.1" if hosts else "1.0"
    async with await RawClient.connect(named.daemon.operators.port) as client:
        await client.send(f"POST /-/reload HTTP/{version}\r\n{fields}\r\n".encode())
        answer = await client.answer()
    assert answer.status == status, answer
    if status != 200:
        check_refused(answer, status, "forbidden" if status == 403 else "invalid_http")
        assert not [line for line in named.logs() if line["event"] == "reloaded"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "", "http://127.0.0.1"])
async def test_a_web_page_cannot_reload(serve: Serve, origin: str) -> None:
    """A reload with any Origin is 403, its own page's too, and nothing is read."""
    proxy = await serve()
    proxy.text = "broken: ["
    async with await RawClient.connect(proxy.daemon.operators.port) as client:
        await client.request("POST", "/-/reload", {"origin": origin})
        check_refused(await client.answer(), 403, "forbidden")
        await client.request("GET", "/-/status", {"origin": origin})
        answer = await client.answer()
    assert answer.status == 200
    assert answer.json()["configuration"]["last_reload_failed"] is None
    assert "access-control-allow-origin" not in answer.headers


# What it says

SEEDED = {"header": "header-secret-8812", "query": "query-secret-4415"}


def seeded(url: str, **changes: Any) -> str:
    """Return a configuration with a secret in every place that takes one."""
    scripted = {
        "url": f"{url}?key={SEEDED['query']}",
        "headers": {"X-Org": SEEDED["header"]},
    }
    return config_text(url, upstreams={"scripted": scripted}, **changes)


async def test_the_configuration_in_force_hides_its_secrets(upstream: ScriptedUpstream) -> None:
    """/-/config is what is in force, after reloads good and bad, and no secret is in any answer."""
    proxy = await Proxy.start(seeded(upstream.url))
    try:
        seen = []

        async def config() -> Any:
            answer = await proxy.admin("/-/config")
            seen.append(answer.body)
            return answer.json()

        first = await config()
        assert first["upstreams"]["scripted"]["url"] == f"{upstream.url}?**********"
        assert first["upstreams"]["scripted"]["headers"] == {"X-Org": "**********"}
        assert first["upstreams"]["scripted"]["credential"]["env"] == "UPSTREAM_KEY"
        assert first["keys"]["team-a"]["sha256"] == ["**********"]
        assert (first["timeouts"]["connect"], first["max_body"]) == ("5s", "32MiB")
        proxy.text = "nonsense"
        assert (await proxy.admin("/-/reload", "POST")).status == 400
        assert await config() == first
        proxy.text = seeded(upstream.url, max_body="1MiB", listen="127.0.0.1:1")
        assert (await proxy.admin("/-/reload", "POST")).status == 200
        assert await config() == first | {"max_body": "1MiB"}, "the old listen stays in force"
        seen += [(await proxy.admin(path)).body for path in READ]
        await check_secrets(proxy, seen)
        for secret in SEEDED.values():
            assert not any(secret.encode() in body for body in (*seen, proxy.tap.raw))
    finally:
        await proxy.stop()


ODD = ["<script>alert(1)</script>", "a&b\"c'd", "</table><img src=x>"]


async def odd(serve: Serve) -> Proxy:
    """Start a daemon whose names are hostile to a page, with keys in each state."""
    named = [{"model": name, "upstreams": ["scripted"]} for name in ODD]
    dead = {"sha256": key_hash(TEAM_B), "expires": "2020-01-01"}
    off = {"sha256": key_hash("x"), "disabled": True}
    late = {"sha256": key_hash("y"), "expires": "2020-01-01", "disabled": True}
    return await serve(
        routes=[*routes(), *named], keys={"team-b": dead, "off": off, "late": late}, max_body="1MiB"
    )


async def test_the_status_is_right(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Its numbers are those of what was asked, of what is in flight, and of each key's state."""
    proxy = await odd(serve)
    await proxy.post()
    await proxy.post(key=TEAM_B)
    go_on = asyncio.Event()
    upstream.script(Headers(200, SSE), Chunk(b": x\n\n"), Wait(go_on), EndChunks())
    body = {"model": "gpt-test", "input": "x" * 5000, "stream": True}
    client = await proxy.send(body=body)
    assert (await client.read_head()).status == 200
    await client.read_until(b": x\n\n")

    async def holds() -> None:
        report = (await proxy.admin("/-/status")).json()
        assert report["requests"] == {"completed": 1, "rejected_auth": 1}
        assert report["connections"] == 1

    await eventually(holds)
    report = (await proxy.admin("/-/status")).json()
    assert (report["version"], report["state"]) == (aiproxy.__version__, "ready")
    ports = (f"127.0.0.1:{proxy.port}", f"127.0.0.1:{proxy.daemon.operators.port}")
    assert (report["listen"], report["admin"]) == ports
    assert (report["in_flight"], report["in_flight_by_endpoint"]) == (1, {"responses": 1})
    assert (report["max_connections"], report["max_buffered_bytes"]) == (4096, 2**29)
    counted = totals(await proxy.metrics(), "aiproxy_tokens_total", "type")
    assert report["tokens"] == counted
    assert (report["buffered_bytes"], report["log_dropped"]) == (0, 0)
    assert report["upstreams"] == [{
        "name": "scripted", "origin": upstream.url.removesuffix("/v1"),
        "apis": ["chat", "embeddings", "messages", "responses"],
        "in_flight": 1, "state": "closed", "retry_in_s": None,
        "connections": 1, "unused_connections": 0,
        "attempts": 1, "errors": {},
        "first_token": {"answers": 0, "p50_s": None, "p95_s": None},
    }]  # fmt: skip
    assert [it["model"] for it in report["routes"]] == ["gpt-test", "renamed", "org/*", *ODD]
    assert {it["name"]: (it["state"], it["in_flight"]) for it in report["keys"]} == {
        "team-a": ("valid", 1), "team-b": ("expired", 0), "off": ("disabled", 0),
        "late": ("disabled", 0),
    }  # fmt: skip
    for moment in (report["started"], report["configuration"]["loaded"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)
    assert 0 <= report["uptime_s"] < 60
    go_on.set()
    await client.read_body()
    assert (await proxy.admin("/-/status")).json()["in_flight"] == 0


async def test_draining_is_said_and_metrics_go_on(serve: Serve, upstream: ScriptedUpstream) -> None:
    """While a stream holds the drain, ready is 503 with the reason; the rest is still answered."""
    proxy = await serve()
    go_on = asyncio.Event()
    upstream.script(Headers(200, SSE), Chunk(b": x\n\n"), Wait(go_on), EndChunks())
    client = await proxy.send(body={"model": "gpt-test", "input": "x", "stream": True})
    await client.read_head()
    assert (await proxy.admin("/-/ready")).body == b"ready\n"
    drain = asyncio.create_task(proxy.daemon.drain())
    await eventually(lambda: is_draining(proxy))
    assert (await proxy.admin("/-/ready", "HEAD")).status == 503
    assert (await proxy.admin("/-/healthy")).status == 200
    report = (await proxy.admin("/-/status")).json()
    assert (report["state"], report["in_flight"]) == ("draining", 1)
    assert (await proxy.admin("/")).status == 200
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_requests_in_flight", "endpoint") == {"responses": 1}
    go_on.set()
    await client.read_body()
    async with asyncio.timeout(5):
        await drain


async def is_draining(proxy: Proxy) -> None:
    """Assert that readiness says so."""
    answer = await proxy.admin("/-/ready")
    assert (answer.status, answer.body) == (503, b"draining\n")


async def test_nothing_here_is_a_request(serve: Serve) -> None:
    """What operators ask, rightly or wrongly, is neither counted nor logged as a request."""
    proxy = await serve()
    for path in (*READ, "/x"):
        await proxy.admin(path)
        await proxy.admin(path, "PUT")
    await check_uncounted(proxy)


@pytest.mark.parametrize("raw", [b"no HTTP\r\n\r\n", b"GET http://h/ HTTP/1.1\r\nhost: h\r\n\r\n"])
async def test_nor_is_what_is_no_request(serve: Serve, raw: bytes) -> None:
    """Malformed HTTP is refused here as among the clients, but is none of theirs."""
    proxy = await serve()
    async with await RawClient.connect(proxy.daemon.operators.port) as client:
        await client.send(raw)
        check_refused(await client.answer(), 400, "invalid_http")
    await check_uncounted(proxy)


async def check_uncounted(proxy: Proxy) -> None:
    """Assert that no request was made, by the metrics, the status and the log."""
    for name in ("aiproxy_requests_total", "aiproxy_requests_in_flight"):
        assert totals(await proxy.metrics(), name, "endpoint") == {}
    assert (await proxy.admin("/-/status")).json()["requests"] == {}
    assert proxy.request_logs() == []
