"""A reload: whole or not at all, at once for what begins after it, and told without secrets."""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiproxy.config import Loaded, load
from certificates import issue
from client import Answer
from conftest import BlockingCalls
from faults import PATHS, Serve, check_closed, check_error, events_of
from invariants import check_conservation, check_secrets, eventually
from responses import responses_json
from rig import ABSENT, TEAM_A, Proxy, config_text, key_hash, prompt, routes
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Send, Wait

SSE = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
THIRD = "sk-aip-third-0123456789abcdefghij"
OK = "aiproxy_config_last_reload_successful"
AT = "aiproxy_config_last_reload_success_timestamp_seconds"


async def gauges(proxy: Proxy) -> tuple[float, float]:
    """Return whether the last reload was successful, and when one was."""
    metrics = await proxy.metrics()
    return metrics[OK, frozenset()], metrics[AT, frozenset()]


async def reload(proxy: Proxy, text: str | None = None) -> Answer:
    """Ask for a reload, of another text."""
    if text is not None:
        proxy.text = text
    return await proxy.admin("/-/reload", "POST")


def events(proxy: Proxy, name: str) -> list[dict[str, Any]]:
    """Return the log lines of one kind."""
    return [line for line in proxy.logs() if line["event"] == name]


# What is said


async def test_the_answer_and_the_log_say_what_changed(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Both name the same, neither has a secret, and warnings come with their place."""
    proxy = await serve()
    began = await gauges(proxy)
    keys = {"team-a": ABSENT, "team-b": {"disabled": True}, "new": {"sha256": key_hash(THIRD)}}
    answer = await reload(proxy, config_text(upstream.url, keys=keys, log={"level": "info"}))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    none: dict[str, list[str]] = {"added": [], "removed": [], "changed": []}
    warned = answer.json()["warnings"]
    assert answer.json() == {
        "status": "reloaded",
        "changes": {
            "upstreams": none,
            "routes": none,
            "keys": {"added": ["new"], "removed": ["team-a"], "changed": ["team-b"]},
            "settings": ["log"],
            "restart": [],
        },
        "warnings": warned,
    }
    assert [w.partition(":")[0] for w in warned] == ["test.yaml"]
    assert warned[0].endswith(": keys.new: has no limit")

    async def logged() -> None:
        plain = ("event", "timestamp")
        lines = events(proxy, "reloaded")
        assert [{n: v for n, v in line.items() if n not in plain} for line in lines] == [{
            "level": "info", "keys_added": ["new"], "keys_removed": ["team-a"],
            "keys_changed": ["team-b"], "settings": ["log"],
        }]  # fmt: skip
        assert [it["warning"] for it in events(proxy, "configuration")] == warned
        assert events(proxy, "restart needed") == []

    await eventually(logged)
    ended = await gauges(proxy)
    assert (began[0], ended[0]) == (1, 1)
    assert began[1] < ended[1] <= time.time()
    await check_secrets(proxy, [answer.body])


BAD = "lisen: x\nroutes: []\n"
MISTAKES = [
    "test.yaml:1:1: lisen: unknown key (did you mean 'listen'?)",
    "test.yaml:1:1: upstreams: is required",
    "test.yaml:2:9: routes: must not be empty",
]


@pytest.mark.parametrize("way", ["POST", "SIGHUP"])
async def test_a_bad_file_is_told_by_every_mistake(serve: Serve, way: str) -> None:
    """The gauge falls and stays so, each mistake is a log line, and the old one goes on."""
    proxy = await serve()
    good, (_, at) = proxy.text, await gauges(proxy)
    proxy.text = BAD
    if way == "POST":
        answer = await reload(proxy)
        error = answer.json()["error"]
        assert (answer.status, error["code"], error["param"]) == (
            400,
            "invalid_configuration",
            None,
        )
        assert sorted(error["message"].split("\n")) == sorted(MISTAKES)
    else:
        await proxy.daemon.reload()

    async def logged() -> None:
        assert sorted(it["mistake"] for it in events(proxy, "reload refused")) == sorted(MISTAKES)
        failed = [(it["level"], it["mistakes"]) for it in events(proxy, "reload failed")]
        assert failed == [("error", 3)]

    await eventually(logged)
    assert await gauges(proxy) == (0, at)
    assert (await proxy.admin("/-/status")).json()["configuration"]["last_reload_failed"]
    assert (await proxy.post()).status == 200
    assert (await reload(proxy, good)).status == 200
    now = await gauges(proxy)
    assert (now[0], now[1] > at) == (1, True)
    assert (await proxy.admin("/-/status")).json()["configuration"]["last_reload_failed"] is None


FILES = {
    "missing": (None, "1:1: cannot be read: No such file or directory"),
    "a directory": (..., "1:1: cannot be read: Is a directory"),
    "not UTF-8": (b"a: \xff\n", "1:4: is not UTF-8"),
    "too large": (b"#" * (2**20 + 1), "1:1: is larger than 1024 KiB"),
    "empty": (b"", "1:1: routes: is required"),
}


@pytest.mark.parametrize("name", FILES)
async def test_a_file_that_cannot_be_read(serve: Serve, tmp_path: Path, name: str) -> None:
    """It is a mistake like the others, the last good one goes on, and a good file heals it."""
    proxy = await serve()
    file = tmp_path / "file"
    content, mistake = FILES[name]
    proxy.daemon._reloader._source = partial(load, file, environ=proxy.environ)
    if content is ...:
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    answer = await reload(proxy)
    assert answer.status == 400
    assert f"test.yaml:{mistake}" in answer.json()["error"]["message"].split("\n")
    assert (await gauges(proxy))[0] == 0
    assert (await proxy.post()).status == 200
    if file.is_dir():
        file.rmdir()
    file.write_text(proxy.text)
    assert (await reload(proxy)).status == 200
    assert (await gauges(proxy))[0] == 1


async def test_a_bug_in_a_reload_is_a_failed_reload(
    serve: Serve, blocking_calls: BlockingCalls
) -> None:
    """What a reload cannot do for another reason than the file is 500, logged, and the gauge 0."""
    blocking_calls.allow("linecache.py", {"checkcache", "updatecache"})  # of a traceback
    proxy = await serve()

    def source() -> Loaded:
        raise RuntimeError("secret of the file")

    kept, proxy.daemon._reloader._source = proxy.daemon._reloader._source, source
    answer = await reload(proxy)
    assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
    assert b"secret of the file" not in answer.body
    assert (await gauges(proxy))[0] == 0
    await proxy.daemon.reload()
    assert (await proxy.post()).status == 200
    proxy.daemon._reloader._source = kept
    assert (await reload(proxy)).status == 200


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example"])
async def test_what_a_check_takes_a_reload_takes(serve: Serve, host: str) -> None:
    """A name that no resolver takes is refused with its place, or is an upstream that is away."""
    proxy = await serve()
    answer = await reload(proxy, config_text(f"http://{host}/v1"))
    assert answer.status in {200, 400}, answer
    assert (await gauges(proxy))[0] == (answer.status == 200)
    assert (await proxy.post()).status == (502 if answer.status == 200 else 200)


# What takes effect


@dataclass(frozen=True)
class Row:
    """Two files, and what one request is answered before and after."""

    name: str
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    statuses: tuple[int, int] = (200, 200)
    key: str = TEAM_A
    model: str = "gpt-test"


MORE = [*routes(), {"model": "more", "upstreams": ["scripted"]}]
AWAY = {"away": {"url": "http://127.0.0.1:1/v1", "apis": ["responses"]}}
TO_AWAY = {"upstreams": AWAY, "routes": routes(upstreams=["away"])}
WITH_THIRD = {"keys": {"third": {"sha256": key_hash(THIRD)}}}
NARROW = {"keys": {"team-a": {"models": ["renamed"]}}}
ROWS = [
    Row("new route", {}, {"routes": MORE}, (404, 200), model="more"),
    Row("removed route", {"routes": MORE}, {}, (200, 404), model="more"),
    Row("new key", {}, WITH_THIRD, (401, 200), key=THIRD),
    Row("removed key", WITH_THIRD, {}, (200, 401), key=THIRD),
    Row("key's models", {}, NARROW, (200, 404)),
    Row("new upstream", TO_AWAY, {}, (502, 200)),
    Row("another upstream", {}, TO_AWAY, (200, 502)),
    Row("max_body", {}, {"max_body": "1KiB"}, (200, 413)),
    Row("max_buffered", {}, {"max_buffered": "1KiB"}, (200, 503)),
    Row("max_output_tokens", {}, {"routes": routes(max_output_tokens=1)}, (200, 400)),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
async def test_it_takes_effect_at_once(serve: Serve, upstream: ScriptedUpstream, row: Row) -> None:
    """What begins after the answer of the reload is under the new file, on old connections too."""
    proxy = await serve(**row.before)
    client = await proxy.client()
    body = json.dumps(prompt(model=row.model, max_output_tokens=5, metadata={"x": "y" * 2000}))

    async def ask() -> int:
        await client.request("POST", "/v1/responses", proxy.headers(key=row.key), body.encode())
        return (await client.answer()).status

    first = await ask()
    if first == 401:
        client = await proxy.client()
    assert (await reload(proxy, config_text(upstream.url, **row.after))).status == 200
    assert (first, await ask()) == row.statuses
    await check_conservation(proxy)


async def test_a_request_keeps_what_it_began_with(serve: Serve, upstream: ScriptedUpstream) -> None:
    """One whose body is still to come goes where the file of its head says, under its key."""
    proxy, body = await serve(), json.dumps(prompt()).encode()
    client = await proxy.client()
    fields = [*proxy.headers(), ("content-length", str(len(body)))]
    await client.request("POST", "/v1/responses", fields)

    async def begun() -> None:
        assert (await proxy.admin("/-/status")).json()["in_flight"] == 1

    await eventually(begun)
    other = {"routes": [{"model": "m", "upstreams": ["away"]}], "keys": ABSENT}
    text = config_text(upstream.url, upstreams={"scripted": ABSENT, **AWAY}, **other)
    assert (await reload(proxy, text)).status == 200
    await client.send(body)
    assert ((await client.answer()).status, len(upstream.requests)) == (200, 1)


async def test_secret_files_are_read_again(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The credential of a file is the new one after a reload, and not before it."""
    token = tmp_path / "token"
    token.write_text("first-credential\n")
    stanza = {"credential": {"env": ABSENT, "file": str(token)}}
    proxy = await serve(upstreams={"scripted": stanza})
    token.write_text("second-credential\n")
    await proxy.post()
    answer = await reload(proxy)
    assert answer.json()["changes"]["upstreams"]["changed"] == ["scripted"]
    await proxy.post()
    token.unlink()
    assert (await reload(proxy)).status == 400
    await proxy.post()
    seen = [it.header("authorization") for it in upstream.requests]
    assert seen == [f"Bearer {n}-credential" for n in ("first", "second", "second")]
    for secret in (b"first-credential", b"second-credential"):
        assert secret not in answer.body + proxy.tap.raw


async def test_authorities_are_read_again(serve: Serve, tmp_path: Path) -> None:
    """A `ca_file` with another content under its name counts from the reload on."""
    ours, other, file = issue(authority=True), issue(authority=True), tmp_path / "ca.pem"
    file.write_bytes(other.pem())
    async with ScriptedUpstream(ssl=issue(ours).context(tmp_path)) as secure:
        stanza = {"url": secure.url, "ca_file": str(file)}
        proxy = await serve(upstreams={"scripted": stanza})
        assert (await proxy.post()).status == 502
        file.write_bytes(ours.pem())
        assert (await proxy.post()).status == 502
        assert (await reload(proxy)).status == 200
        body = json.dumps(responses_json()).encode()
        fields = [("content-type", "application/json"), ("content-length", str(len(body)))]
        secure.script(Send(Headers(200, fields).encode() + body))
        assert (await proxy.post()).status == 200
        file.write_bytes(other.pem())
        assert (await reload(proxy)).status == 200
        assert (await proxy.post()).status == 502, "no pooled connection of the old authority"


async def test_bounds_of_connections_take_effect(serve: Serve, upstream: ScriptedUpstream) -> None:
    """How many, how slow and how idle a connection may be is the new file's for what comes next."""
    proxy = await serve()
    old = await proxy.client()
    await old.request("GET", "/")
    assert (await old.answer()).status == 200
    shorter = {"client_keepalive": "100ms", "timeouts": {"client_header": "100ms"}}
    await reload(proxy, config_text(upstream.url, max_connections=2, **shorter))
    silent = await proxy.client()
    over = await proxy.client()
    check_error(await over.answer(), 503, "overloaded", "responses")
    await check_closed(silent)
    idle = await proxy.client()
    await idle.request("GET", "/")
    assert (await idle.answer()).status == 200
    await check_closed(idle)
    await old.request("GET", "/")
    assert (await old.answer()).status == 200, "one that was there keeps what it was told"
    await reload(proxy, config_text(upstream.url))
    assert [(await proxy.get("/")).status for _ in range(3)] == [200] * 3


# One at a time


async def test_reloads_come_one_after_another(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Of two at once the second reads only when the first is done; the file's last word counts."""
    proxy = await serve()
    read, go_on = asyncio.Event(), threading.Event()
    loop, source, reading, most = asyncio.get_running_loop(), proxy.daemon._reloader._source, 0, 0

    def slow() -> Loaded:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        loaded = source()
        loop.call_soon_threadsafe(read.set)
        assert go_on.wait(5)
        reading -= 1
        return loaded

    proxy.daemon._reloader._source = slow
    proxy.text = config_text(upstream.url, routes=MORE)
    first = asyncio.create_task(reload(proxy))
    async with asyncio.timeout(5):
        await read.wait()
    read.clear()
    proxy.text = config_text(upstream.url, **WITH_THIRD)
    others = [asyncio.create_task(reload(proxy)), asyncio.create_task(proxy.daemon.reload())]
    assert (await proxy.post()).status == 200, "requests are served meanwhile"
    assert (await proxy.post(key=THIRD)).status == 401
    assert not read.is_set()
    go_on.set()
    async with asyncio.timeout(5):
        answer = await first
        await asyncio.gather(*others)
    assert answer.json()["changes"]["routes"]["added"] == ["more"]
    assert most == 1
    assert (await proxy.post(key=THIRD)).status == 200
    assert (await proxy.post(body=prompt(model="more"))).status == 404

    async def logged() -> None:
        assert len(events(proxy, "reloaded")) == 3

    await eventually(logged)


async def test_no_reload_while_draining(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A daemon that ends takes no new configuration, and says why."""
    proxy = await serve()
    go_on, frames = asyncio.Event(), events_of("responses")
    upstream.script(Headers(200, SSE), Chunk(frames[0]), Wait(go_on), *map(Chunk, frames[1:]),
                    EndChunks())  # fmt: skip
    client = await proxy.send(PATHS["responses"], prompt(stream=True))
    await client.read_head()
    before = (await proxy.admin("/-/config")).json()
    drain = asyncio.create_task(proxy.daemon.drain())

    async def refused() -> None:
        answer = await reload(proxy, config_text(upstream.url, max_body="1MiB"))
        check_error(answer, 503, "shutting_down", "responses")
        assert answer.headers["retry-after"] == "1"

    await eventually(refused)
    assert (await proxy.admin("/-/config")).json() == before
    go_on.set()
    assert await client.read_body() == b"".join(frames)
    async with asyncio.timeout(5):
        await drain
    assert events(proxy, "reloaded") == []
