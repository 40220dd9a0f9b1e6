"""The log: one line per request, its fields, and a standard error that blocks."""

import asyncio
import io
import json
import os
import re
import sys
import threading
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from answers import USAGE
from invariants import check_secrets
from responses import responses_events
from rig import CREDENTIAL, OUTPUT_CANARY, PROMPT_CANARY, Proxy, prompt, totals
from upstream import Finish, ScriptedUpstream, Stall, error_answer, json_answer, stream

from aiproxy import logs
from aiproxy.exchange import Exchange
from aiproxy.logs import LineWriter, Log, request_fields, standard_error

Serve = Callable[..., Awaitable[Proxy]]
RESPONSES = "/v1/responses"

# Contract, section 10.
FIELDS = set(
    "request_id key endpoint route upstream model attempts status outcome error_code"
    " upstream_request_id duration_s first_token_s overhead_s input_tokens input_cached_tokens"
    " output_tokens output_reasoning_tokens estimated replayed_turns bytes_in bytes_out client".split()
)  # fmt: skip


async def line_of(proxy: Proxy, n: int = 1) -> dict[str, Any]:
    """The n-th request's line, once it is there."""
    async with asyncio.timeout(2):
        while len(proxy.request_logs()) < n:
            await asyncio.sleep(0.005)
    return proxy.request_logs()[n - 1]


class Memory:
    """A stream that keeps what is written, and may be held up."""

    def __init__(self) -> None:
        self.raw = b""
        self.free = threading.Event()
        self.free.set()
        self.held = threading.Event()

    def write(self, data: memoryview, /) -> int | None:
        """Keep it, once free."""
        if not self.free.is_set():
            self.held.set()
        self.free.wait(5)
        self.raw += bytes(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing."""


def written(fmt: str = "json", level: str = "debug", **options: Any) -> bytes:
    """What a line of each level looks like."""
    memory = Memory()
    log = Log(memory, level=level, fmt=fmt, **options)
    for name in ("debug", "info", "warning", "error"):
        getattr(log.process, name)(f"a {name}", text='x"\n\x1b[31m\u2028', number=1)
    log.close()
    return memory.raw


# A request's line


async def test_fields(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A line has exactly the fields of the contract, with the facts of its request."""
    proxy = await serve()
    body = json.dumps(prompt(stream=True)).encode()
    events = responses_events()
    upstream.script(stream(events, headers=[("x-request-id", "req_up")]))
    answer = await proxy.post(RESPONSES, body, {"x-request-id": "mine-1"})
    line = await line_of(proxy)
    assert line.keys() - {"event", "level", "timestamp"} == FIELDS
    assert (line["event"], line["level"]) == ("request", "info")
    assert datetime.fromisoformat(line["timestamp"]).tzinfo is not None
    facts = {
        "request_id": "mine-1",
        "key": "team-a",
        "endpoint": "responses",
        "route": "gpt-test",
        "upstream": "scripted",
        "model": "gpt-test",
        "attempts": 1,
        "status": 200,
        "outcome": "completed",
        "upstream_request_id": "req_up",
        "input_tokens": USAGE.input - USAGE.cached,
        "input_cached_tokens": USAGE.cached,
        "output_tokens": USAGE.output - USAGE.reasoning,
        "output_reasoning_tokens": USAGE.reasoning,
        "estimated": False,
        "replayed_turns": 0,
        "bytes_in": len(body),
        "bytes_out": len(b"".join(events)),
        "client": "127.0.0.1",
    }
    assert {name: line[name] for name in facts} == facts
    assert not line["error_code"]
    assert 0 < line["overhead_s"] < line["first_token_s"] <= line["duration_s"] < 5
    assert answer.headers["x-request-id"] == "mine-1"


async def test_what_did_not_happen(serve: Serve) -> None:
    """A refused request has its code, and no times or tokens of an upstream."""
    proxy = await serve()
    answer = await proxy.post(RESPONSES, key="sk-aip-unknown")
    line = await line_of(proxy)
    assert (line["status"], line["outcome"]) == (401, "rejected_auth")
    assert (line["error_code"], line["key"], line["route"]) == ("invalid_api_key", "none", "none")
    assert (line["attempts"], line["first_token_s"], line["overhead_s"]) == (0, None, None)
    assert (line["input_tokens"], line["output_tokens"]) == (0, 0)
    assert line["bytes_out"] == len(answer.body)


async def test_one_line_at_the_end(serve: Serve, upstream: ScriptedUpstream) -> None:
    """No line while a stream is open; one when its client left, with status 499 (traps, 56)."""
    proxy = await serve()
    events = responses_events()
    upstream.script([*stream(events)[:-3], Stall()])
    client = await proxy.send(RESPONSES, prompt(stream=True))
    await client.read_head()
    await client.read_until(events[3])
    assert proxy.request_logs() == []
    await client.close()
    line = await line_of(proxy)
    assert (line["status"], line["outcome"]) == (499, "client_disconnected")
    assert len(proxy.request_logs()) == 1


async def test_an_upstreams_refusal(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The upstream's own code and request id are in the line."""
    proxy = await serve()
    upstream.script(error_answer(400, code="bad_thing", headers=[("request-id", "req_1")]))
    await proxy.post(RESPONSES)
    line = await line_of(proxy)
    assert (line["status"], line["outcome"]) == (400, "upstream_rejected")
    assert (line["error_code"], line["upstream_request_id"]) == ("bad_thing", "req_1")


@pytest.mark.parametrize("route", ["org/*", "none"])
async def test_caller_made_strings_are_cut(serve: Serve, route: str) -> None:
    """A model's name is cut at 128 characters, its control characters escaped."""
    proxy = await serve()
    prefix = "org/" if route == "org/*" else ""
    await proxy.post(RESPONSES, prompt(model=f"{prefix}\x1b[31m\n\x9b\u2028" + "m" * 5000))
    model = (await line_of(proxy))["model"]
    assert model.startswith(f"{prefix}\\x1b[31m\\n\\x9b\\u2028mmm")
    assert model.count("m") <= 128
    assert model.isprintable()


async def test_a_callers_id_that_may_not_be_repeated(serve: Serve) -> None:
    """A request id of other characters, or too long, is replaced by a new one."""
    proxy = await serve()
    for n, given in enumerate(("a" * 129, "a b", "x/y", ""), 1):
        answer = await proxy.post(RESPONSES, headers={"x-request-id": given})
        line = await line_of(proxy, n)
        assert line["request_id"] == answer.headers["x-request-id"]
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", line["request_id"])
        assert line["request_id"] != given


async def test_what_an_upstream_says_is_cut_too(serve: Serve, upstream: ScriptedUpstream) -> None:
    """An error code or request id from outside is no way to fill the log, nor to forge it."""
    proxy = await serve()
    long = "\x1b[31m" + "c" * 5000
    fields = [("x-request-id", "r" * 5000)]
    upstream.script(error_answer(400, code=long, headers=fields))
    await proxy.post(RESPONSES)
    line = await line_of(proxy)
    assert len(line["upstream_request_id"]) == 128
    assert line["error_code"].isprintable()
    assert len(line["error_code"]) <= 140


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("evil, 203.0.113.7", "203.0.113.7"),
        ("203.0.113.7, 127.0.0.2", "203.0.113.7"),
        ("203.0.113.7, evil", "127.0.0.1"),
        ("2001:db8::7, 127.0.0.2", "2001:db8::7"),
    ],
)
async def test_the_client_behind_a_proxy(serve: Serve, forwarded: str, client: str) -> None:
    """Behind trusted proxies the client is the right-most address that is not one of them."""
    proxy = await serve(trusted_proxies=["127.0.0.0/8"])
    await proxy.post(RESPONSES, headers={"x-forwarded-for": forwarded})
    assert (await line_of(proxy))["client"] == client


@pytest.mark.parametrize("zone", ["z" * 5000, "\x9b"])
async def test_a_forwarded_zone_is_caller_made(serve: Serve, zone: str) -> None:
    """An address may carry any text as its zone: it is cut, escaped, and breaks nothing."""
    proxy = await serve(trusted_proxies=["127.0.0.0/8"])
    forwarded = f"fe80::1%{zone}, 127.0.0.2"
    assert (await proxy.post(RESPONSES, headers={"x-forwarded-for": forwarded})).status == 200
    client = (await line_of(proxy))["client"]
    assert len(client) <= 128
    assert client.isprintable()


async def test_malformed_http_behind_a_proxy(serve: Serve) -> None:
    """What is no request is answered and logged with trusted proxies, too."""
    proxy = await serve(trusted_proxies=["127.0.0.0/8"])
    client = await proxy.client()
    await client.send(b"GET / HTTP/1.1\r\nno field\r\n\r\n")
    assert b" 400 " in (await client.reader.read()).split(b"\r\n")[0]
    line = await line_of(proxy)
    assert (line["status"], line["client"]) == (400, "127.0.0.1")


async def test_nothing_secret_at_debug(serve: Serve, upstream: ScriptedUpstream) -> None:
    """No key, credential, prompt or output is in the log, whatever happens (traps, 57)."""
    proxy = await serve(log={"level": "debug"})
    upstream.text = f"Hello {OUTPUT_CANARY}"
    bad = json.dumps(prompt()).encode()[:-1]
    for path in (RESPONSES, "/v1/chat/completions", "/v1/messages"):
        for streamed in (False, True):
            await proxy.post(path, prompt(path, stream=streamed))
        upstream.script(error_answer(400, f"no: {PROMPT_CANARY} {CREDENTIAL}"))
        await proxy.post(path)
        upstream.script(json_answer(OUTPUT_CANARY.encode()))
        await proxy.post(path)
        upstream.script([*stream(responses_events(OUTPUT_CANARY))[:-4], Finish()])
        await proxy.post(path, prompt(path, stream=True))
        await proxy.post(path, bad)
        await proxy.post(path, prompt(path, temperature=PROMPT_CANARY, stream=PROMPT_CANARY))
    await proxy.post(RESPONSES, headers={"x-api-key": proxy.other_key})
    await line_of(proxy, 19)
    await check_secrets(proxy)


def test_the_fields_of_an_empty_exchange() -> None:
    """The fields are the same for a request of which nothing is known."""

    class Nowhere:
        def begin(self, exchange: Exchange) -> None:
            """Do nothing."""

        def record(self, exchange: Exchange) -> None:
            """Do nothing."""

    exchange = Exchange("r", "none", Nowhere(), clock=lambda: 12.5, started=10.0)
    exchange.finish("rejected_invalid")
    exchange.finish("completed")
    fields = request_fields(exchange)
    assert fields.keys() == FIELDS
    assert (fields["duration_s"], fields["outcome"]) == (2.5, "rejected_invalid")


# Formats and levels


def test_json() -> None:
    """A line is one JSON object, whatever its values hold."""
    lines = [json.loads(line) for line in written().splitlines()]
    assert [line["level"] for line in lines] == ["debug", "info", "warning", "error"]
    assert {line["text"] for line in lines} == {'x"\n\x1b[31m\u2028'}
    assert b"\x1b" not in written()


def test_journald_priorities() -> None:
    """Under journald each line begins with its syslog priority."""
    lines = written(journal=True).splitlines()
    assert [line[:3] for line in lines] == [b"<7>", b"<6>", b"<4>", b"<3>"]
    assert all(json.loads(line[3:]) for line in lines)


@pytest.mark.parametrize(
    ("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
@pytest.mark.parametrize("fmt", ["json", "console"])
def test_levels(fmt: str, level: str, count: int) -> None:
    """What is below the level is left out."""
    assert len(re.findall(rb"a (?:debug|info|warning|error)", written(fmt, level))) == count


def test_console() -> None:
    """For a terminal a line is text: no JSON, no colour codes in a file, one line each."""
    lines = written("console").splitlines()
    assert len(lines) == 4
    assert all(b"number=1" in line for line in lines)
    assert all(b"\x1b" not in line for line in lines)
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(lines[0].decode().lstrip("0123456789-:.TZ "))


@pytest.mark.parametrize(("level", "lines"), [("info", 1), ("warning", 0)])
async def test_request_lines_are_of_level_info(serve: Serve, level: str, lines: int) -> None:
    """Above `info` requests are not logged, but still counted."""
    proxy = await serve(log={"level": level})
    await proxy.post(RESPONSES)
    assert totals(await proxy.metrics(), "aiproxy_requests_total", "outcome") == {"completed": 1}
    proxy.daemon.log.error("afterwards")
    async with asyncio.timeout(2):
        while not any(line["event"] == "afterwards" for line in proxy.logs()):
            await asyncio.sleep(0.005)
    assert len(proxy.request_logs()) == lines


@pytest.mark.parametrize("ours", [False, True])
def test_journald_is_known_by_its_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ours: bool  # noqa: FBT001
) -> None:  # fmt: skip
    """The prefix is for a standard error that journald itself connected, not for a redirected one."""
    with (tmp_path / "stderr").open("w") as stderr:
        status = os.fstat(stderr.fileno())
        monkeypatch.setattr(sys, "stderr", stderr)
        inode = status.st_ino if ours else status.st_ino + 1
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{inode}")
        stream_out, journal = standard_error()
        assert journal is ours
        stream_out.write(memoryview(b"x\n"))
        assert isinstance(stream_out, io.RawIOBase)
        stream_out.close()
    assert (tmp_path / "stderr").read_bytes() == b"x\n"


# A stream that blocks


async def test_a_blocked_stream_drops_lines(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """While standard error is blocked requests go on, and dropped lines are counted."""
    monkeypatch.setattr(logs, "MAX_WAITING", 5)
    proxy = await serve()
    blocked, free = threading.Event(), threading.Event()
    write = proxy.tap.write

    def held_up(data: bytes | memoryview, /) -> int:
        blocked.set()
        free.wait(5)
        return write(data)

    monkeypatch.setattr(proxy.tap, "write", held_up)
    try:
        await proxy.post(RESPONSES)
        await asyncio.to_thread(blocked.wait, 5)
        for _ in range(12):
            assert (await proxy.post(RESPONSES)).status == 200
        metrics = await proxy.metrics()
        assert metrics["aiproxy_log_dropped_total", frozenset()] == 12 - 5
        assert totals(metrics, "aiproxy_requests_total", "outcome") == {"completed": 13}
    finally:
        free.set()
    await line_of(proxy, 6)
    await proxy.post(RESPONSES)
    await line_of(proxy, 7)


def test_who_logs_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is taken while the writer is held up, and all lines come out in order later."""
    memory = Memory()
    memory.free.clear()
    writer = LineWriter(memory)
    writer.msg(b"0")
    assert memory.held.wait(5)
    for n in range(1, 100):
        writer.msg(b"%d" % n)
    assert memory.raw == b""
    memory.free.set()
    writer.close()
    assert memory.raw.split() == [b"%d" % n for n in range(100)]
    assert writer.dropped == 0


def test_closing_does_not_wait_for_ever() -> None:
    """A stream that stays blocked costs the daemon's end a bounded time."""
    memory = Memory()
    memory.free.clear()
    writer = LineWriter(memory)
    writer.msg(b"x")
    writer.close(0.05)
    assert memory.raw == b""
    memory.free.set()


@pytest.mark.parametrize("error", [OSError("gone"), BrokenPipeError(), ValueError("closed")])
def test_a_reader_that_is_gone(error: Exception) -> None:
    """Where nobody reads any more lines are dropped and counted, and nothing breaks."""

    class Gone(Memory):
        def write(self, data: memoryview, /) -> int | None:
            raise error

    writer = LineWriter(Gone())
    writer.msg(b"a")
    writer.msg(b"b")
    writer.close()
    assert writer.dropped == 2


def test_a_stream_that_takes_a_part() -> None:
    """Partial and refused writes of a non-blocking stream lose nothing."""
    answers = [1, None, 2, None]

    class Slow(Memory):
        def write(self, data: memoryview, /) -> int | None:
            taken = answers.pop(0) if answers else len(data)
            self.raw += bytes(data[: taken or 0])
            return taken

    slow = Slow()
    writer = LineWriter(slow)
    writer.msg(b"hello")
    writer.msg(b"world")
    writer.close()
    assert slow.raw == b"hello\nworld\n"
