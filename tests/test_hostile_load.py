"""Hostile input in masses: nothing grows by it, nothing leaks, and others are served meanwhile."""

import asyncio
import gzip
import json
import os
import random
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import brotli  # type: ignore[import-untyped]
import pytest

from aiproxy import listener
from client import Answer
from faults import Serve
from hostile import (
    HOST,
    KEY,
    C,
    Wire,
    check_after,
    check_wire,
    chunked,
    dial,
    head,
    length,
    post,
    send,
)
from invariants import eventually
from refusals import Refusal
from rig import PROMPT_CANARY, Metrics, Proxy, prompt
from upstream import ScriptedUpstream

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 2**20
OVERLOADED = Refusal(503, "overloaded", kind="server_error", headers={"retry-after": None})
BAD_KEY = "sk-aip-seeded-bad-key-5512"  # begins what is presented in vain


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read on but shortly behind an answer that came before the request's end."""
    monkeypatch.setattr(listener, "LINGER", 0.1)


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a number of the kernel's
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def quick_tap(proxy: Proxy) -> None:
    """Let the log of very many requests be kept without copying it again and again."""
    cast("Any", proxy.tap).raw = bytearray(proxy.tap.raw)


def series(metrics: Metrics) -> set[Any]:
    """Return names and labels of all samples, the process's own apart."""
    return {key for key in metrics if not key[0].startswith(("process_", "python_"))}


# 10,000 requests

_KNOWN = (
    "PROPFIND",
    "QUERY",
    "PATCH",
    "OPTIONS",
    "TRACE",
    "DELETE",
    "PUT",
    "GET",
    "LINK",
    "SEARCH",
)


def _text(chance: random.Random, size: int) -> str:
    return "".join(chance.choices("abcXYZ019-._~*?%$&'()+,;=@{}|", k=size))


def _models(chance: random.Random) -> bytes:
    model = _text(chance, 2000)
    return post(body=json.dumps(prompt(C, model=model)).encode())


def _paths(chance: random.Random) -> bytes:
    return post(target=f"/v1/{_text(chance, 2000)}/%2e%2e?{_text(chance, 50)}")


def _methods(chance: random.Random) -> bytes:
    return post(method=chance.choice(_KNOWN), target=C)


def _fields(chance: random.Random) -> bytes:
    names = ("x-request-id", "user-agent", "x-forwarded-for", "cookie", f"x-{chance.random()}")
    lines = [f"{name}: {_text(chance, 500)}" for name in names]
    return head(HOST, KEY, *lines, method="GET", target="/v1/models")


def _keys(chance: random.Random) -> bytes:
    value = f"{BAD_KEY}-{chance.random()}-{_text(chance, 500)}"
    line = chance.choice(["authorization: Bearer ", "x-api-key: ", "authorization: "]) + value
    body = json.dumps(prompt(C)).encode()
    return head(HOST, line, length(body)) + body


KINDS: dict[Callable[[random.Random], bytes], tuple[int, int]] = {  # status, how many at once
    _models: (404, 8), _paths: (404, 8), _methods: (405, 8), _fields: (200, 8), _keys: (401, 1),
}  # fmt: skip


def batches(chance: random.Random, total: int) -> Iterator[tuple[list[bytes], int]]:
    """Make requests in batches that may wait behind one another, and their status."""
    for kind, (status, at_once) in KINDS.items():
        for _ in range(total // len(KINDS) // at_once):
            yield [kind(chance) for _ in range(at_once)], status


async def flood(proxy: Proxy, chance: random.Random, total: int) -> int:
    """Send requests over several connections, each batch at once; return how many were answered."""
    queue = list(batches(chance, total))
    chance.shuffle(queue)
    answered = 0

    async def one() -> None:
        nonlocal answered
        wire = await dial(proxy.port)
        while queue:
            requests, status = queue.pop()
            if wire.closed:
                wire = await dial(proxy.port)
            wire.received.clear()
            await send(wire, [b"".join(requests)])
            found, rest = await wire.until(len(requests))
            assert ([answer.status for answer in found], rest) == ([status] * len(requests), b"")
            check_wire(bytes(wire.received))
            answered += len(found)
            if status == 401:
                await wire.until_closed()
        wire.transport.abort()

    await asyncio.gather(*(one() for _ in range(10)))
    return answered


async def test_ten_thousand_hostile_requests(serve: Serve, upstream: ScriptedUpstream) -> None:
    """They add no metric series and no memory, and what is secret is nowhere, also at DEBUG."""
    proxy = await serve()
    quick_tap(proxy)
    chance = random.Random(1)  # noqa: S311 - no secret is made of it
    answered = await flood(proxy, chance, 2000)
    before, size, logged = series(await proxy.metrics()), resident(), len(proxy.tap.raw)
    answered += await flood(proxy, chance, 8000)
    assert answered == 10_000
    assert series(await proxy.metrics()) == before
    assert resident() - size < 16 * MIB + 2 * (len(proxy.tap.raw) - logged)
    assert upstream.requests == []

    async def logged_all() -> None:
        assert len(proxy.request_logs()) == 10_000

    await eventually(logged_all)
    for secret in (BAD_KEY, PROMPT_CANARY):
        assert secret.encode() not in proxy.tap.raw
    await check_after(proxy, upstream)


# Slowness


async def test_f40_slow_heads_while_the_loop_is_blocked(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """1,000 sockets with slow heads are closed at `client_header`; 200 clients are all served."""
    proxy = await serve(timeouts={"client_header": "1s"})
    wires = [await dial(proxy.port) for _ in range(1000)]
    for number, wire in enumerate(wires):
        wire.transport.write(post()[: number % 100])
    normal = [asyncio.ensure_future(proxy.post(C, prompt(C))) for _ in range(200)]
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - the fault itself
    answers = await asyncio.gather(*normal)
    assert [answer.status for answer in answers] == [200] * 200
    for wire in wires:
        assert await wire.until_closed() == ([], b"")
    await check_after(proxy, upstream)


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_slow_bodies(framing: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """Bodies that come a byte at a time are 408 in time, and others are served meanwhile."""
    proxy = await serve(timeouts={"client_body": "300ms"})
    start = chunked(b"") if framing == "chunks" else head(HOST, KEY, "content-length: 100000")
    wires = [await dial(proxy.port) for _ in range(50)]
    for wire in wires:
        wire.transport.write(start)
    for _ in range(100):
        if all(wire.received for wire in wires):
            break
        for wire in wires:
            if not wire.received:
                wire.transport.write(b"1\r\n{\r\n" if framing == "chunks" else b"{")
        assert (await proxy.post(C, prompt(C))).status == 200
        await asyncio.sleep(0.01)
    for wire in wires:
        (answer,), rest = await wire.until_closed()
        assert rest == b""
        Refusal(408, "request_timeout", headers={"connection": "close"}).check(answer)
    await check_after(proxy, upstream)


# Bounds


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": _deflate,
    "br": lambda data: bytes(brotli.compress(data, quality=1)),
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("coding", PACKERS)
async def test_many_bombs_at_once(coding: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """Each is 413, and what they would grow to is never held."""
    proxy = await serve(max_body="1MiB")
    bomb = PACKERS[coding](bytes(64 * MIB))
    assert len(bomb) < MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fields = {"content-encoding": coding}
    answers = await asyncio.gather(*(proxy.post(C, bomb, fields) for _ in range(20)))
    for answer in answers:
        Refusal(413, "request_too_large").check(answer)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 20 * (3 * MIB + 2 * len(bomb))
    await check_after(proxy, upstream)


async def test_many_connections(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Those above `max_connections` are 503 and closed, whatever they send; a free place serves."""
    proxy = await serve(max_connections=20, timeouts={"client_header": "30s"})
    wires = [await dial(proxy.port) for _ in range(20)]
    for _ in range(3):
        above = [await dial(proxy.port) for _ in range(10)]
        for number, wire in enumerate(above):
            await send(wire, [post()[: number * 40]])
        for wire in above:
            (answer,), rest = await wire.until_closed()
            assert rest == b""
            OVERLOADED.check(answer)
        wires.pop().transport.abort()

        async def served() -> None:
            assert (await proxy.post(C, prompt(C))).status == 200

        await eventually(served)
        wires.append(await dial(proxy.port))
        await send(wires[-1], [b"G"])
    assert len(upstream.requests) == 3
    for wire in wires:
        wire.transport.abort()

    async def free() -> None:
        again = [await dial(proxy.port) for _ in range(20)]
        for wire in again:
            await send(wire, [head(HOST, method="GET", target="/")])
        found = [await wire.until(1) for wire in again]
        for wire in again:
            wire.transport.abort()
        assert statuses_of(found) == [200] * 20

    await eventually(free)
    await eventually(partial(check_after, proxy, upstream))


def statuses_of(found: Iterable[tuple[list[Answer], bytes]]) -> list[int]:
    """Return the one status of each connection."""
    return [answer.status for answers, _ in found for answer in answers]


async def test_many_large_bodies(serve: Serve, upstream: ScriptedUpstream) -> None:
    """What goes over `max_buffered` together is 503; the rest is served; all is given back."""
    proxy = await serve(max_body="2MiB", max_buffered="2MiB")
    body = json.dumps(prompt(C, x="y" * 500_000)).encode()
    for _ in range(2):
        wires = [await dial(proxy.port) for _ in range(20)]
        for wire in wires:
            wire.transport.write(
                head(HOST, KEY, "connection: close", length(body)) + body[:400_000]
            )

        async def refused(wires: list[Wire] = wires) -> None:
            assert sum(bool(wire.received) for wire in wires) >= 15

        await eventually(refused)
        for wire in wires:
            if not wire.received:
                wire.transport.write(body[400_000:])
        found = [await wire.until_closed() for wire in wires]
        statuses = statuses_of(found)
        assert len(statuses) == 20
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 2
        for (answer,), rest in found:
            assert rest == b""
            if answer.status == 503:
                OVERLOADED.check(answer)
    # Only where all of it was given back is there room for this one.
    whole = json.dumps(prompt(C, x="y" * 2_000_000)).encode()
    assert (await proxy.post(C, whole)).status == 200
    await check_after(proxy, upstream)


async def test_pipelining_of_a_thousand(serve: Serve, upstream: ScriptedUpstream) -> None:
    """1,000 requests on one connection, eight at a time, are answered in their order."""
    proxy = await serve()
    wire = await dial(proxy.port)
    for first in range(0, 1000, 8):
        names = [f"org/{number}" for number in range(first, first + 8)]
        wire.received.clear()
        bodies = [json.dumps(prompt(C, model=name)).encode() for name in names]
        await send(wire, [b"".join(post(body=body) for body in bodies)])
        found, rest = await wire.until(8)
        assert rest == b""
        assert [answer.json()["model"] for answer in found] == names
    wire.transport.abort()
    await check_after(proxy, upstream)


async def test_a_thousand_requests_at_once(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Sent without waiting they may be cut, but those answered are whole and in their order."""
    proxy = await serve()
    names = [f"org/{number}" for number in range(1000)]
    for _ in range(5):
        wire = await dial(proxy.port)
        bodies = [json.dumps(prompt(C, model=name)).encode() for name in names]
        await send(wire, [b"".join(post(body=body) for body in bodies)])
        found, _ = await wire.until(1000)
        assert [answer.json()["model"] for answer in found] == names[: len(found)]
        wire.transport.abort()
    await check_after(proxy, upstream)
