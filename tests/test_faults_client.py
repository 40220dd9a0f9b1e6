"""Faults of clients, F06 to F10: slow, stuck, or gone; and what they are charged."""

import asyncio
import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from answers import sse
from client import IncompleteBody, RawClient
from faults import (
    FIRST_DELTA,
    PATHS,
    STREAMED,
    Api,
    Charge,
    Script,
    Serve,
    asked,
    begin,
    check_charge,
    delivered,
    events_of,
    fresh_request_id,
    json_of,
    line_of,
    wait_gone,
)
from invariants import check_invariants
from rig import Proxy, totals
from upstream import (
    Chunk,
    Headers,
    Repeat,
    ScriptedUpstream,
    Send,
    Stall,
    Wait,
    json_answer,
    stream,
)

CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
EACH = pytest.mark.parametrize("api", STREAMED)
SEEN_WITHIN = 0.5  # s: 100 ms are promised; the rest is for a machine that others use, too
BUFFERS = 8 * 2**20  # bytes: 4 MiB that the kernel keeps for the upstream, and ours


async def leave(client: RawClient, way: str) -> float:
    """Go in one of three ways; return the loop time."""
    now = asyncio.get_running_loop().time()
    if way == "close":
        await client.close()
    elif way == "half-close":
        client.half_close()
    else:
        client.abort()
    return now


async def send(
    proxy: Proxy, api: Api, *, streamed: bool, **fields: object
) -> tuple[RawClient, str]:
    """Send a request; return its connection and its id."""
    request_id = fresh_request_id()
    body = asked(api, streamed=streamed, **fields)
    return await proxy.send(PATHS[api], body, {"x-request-id": request_id}), request_id


def big_delta(size: int) -> bytes:
    """Return one delta of a Responses stream with that much text."""
    return sse(
        {
            "type": "response.output_text.delta",
            "sequence_number": 5,
            "item_id": "msg_1",
            "output_index": 0,
            "content_index": 0,
            "delta": "x" * size,
            "logprobs": [],
        },
        event="response.output_text.delta",
    )


# F06, F07: clients that are slow or stuck


def memory() -> int:
    """Return the bytes that this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


async def test_f06_a_slow_client_slows_the_upstream_and_gets_all(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """50 MB to a slow reader arrive whole; the upstream is never more than the buffers ahead."""
    proxy, baseline = await begin(serve, upstream)
    frames = events_of("responses")
    delta, many = b'event: x\ndata: {"type": "%b"}\n\n' % (b"x" * 2**18), 200
    steps = stream(frames)
    upstream.script(*steps[:6], Repeat(delta, many), *steps[6:])
    before = memory()
    request_id = fresh_request_id()
    client = await proxy.send(
        PATHS["responses"],
        asked("responses", streamed=True),
        {"x-request-id": request_id},
        rcvbuf=2**18,
        limit=2**18,
    )
    client.pause()
    request = await upstream.wait_request(len(upstream.requests) + 1)
    stuck = -1
    while stuck != request.sent:  # nobody reads: the upstream comes to a stop
        stuck = request.sent
        await asyncio.sleep(0.05)
    assert 0 < stuck < BUFFERS
    assert memory() - before < 2 * BUFFERS
    await client.read_head()
    got, checked, most = bytearray(), 0, 0
    expected = b"".join([*frames[:5], *[delta] * many, *frames[5:]])
    while chunk := (await client.read_chunk())[0]:
        got += chunk
        if len(got) - checked > 2**22:
            checked = len(got)
            client.pause()
            await asyncio.sleep(0.03)
            most = max(most, request.sent - len(got))
    assert bytes(got) == expected
    assert most < BUFFERS
    check_charge(await line_of(proxy, request_id), "usage")
    await check_invariants(proxy, upstream, baseline=baseline, stream=bytes(got), completed=True)


@pytest.mark.parametrize("ended", [False, True], ids=["mid-stream", "all sent"])
async def test_f07_a_client_that_stops_reading_is_cut(
    serve: Serve,
    upstream: ScriptedUpstream,
    ended: bool,  # noqa: FBT001
) -> None:
    """After `client_write` without progress the request ends on both sides, and is charged."""
    proxy, baseline = await begin(serve, upstream, timeouts={"client_write": "300ms"})
    frames = events_of("responses")
    delta = big_delta(2**16)
    many = 24 if ended else 2000
    upstream.script(Headers(200, CHUNKED), Chunk(b"".join(frames[:4])), Repeat(delta, many))
    request_id = fresh_request_id()
    client = await proxy.send(
        PATHS["responses"],
        asked("responses", streamed=True),
        {"x-request-id": request_id},
        rcvbuf=4096,
        limit=1024,
    )
    client.pause()
    line = await line_of(proxy, request_id, within=3)
    assert (line["status"], line["outcome"]) == (499, "client_disconnected")
    assert line["duration_s"] < 0.3 + 1.0
    assert line["output_tokens"] * 4 >= 2**16
    check_charge(line, "estimate", upstream.requests[-1])
    await wait_gone(upstream, len(upstream.requests))
    with pytest.raises((IncompleteBody, ConnectionError)):
        await client.answer()
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f07_a_client_that_reads_a_little_is_not_cut(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A client that takes more than 1 KiB in each `client_write` stays, however slow it is."""
    proxy, baseline = await begin(serve, upstream, timeouts={"client_write": "200ms"})
    frames = events_of("responses")
    delta = big_delta(2**16)
    upstream.script(stream([*frames[:5], *[delta] * 120, *frames[5:]]))
    request_id = fresh_request_id()
    client = await proxy.send(
        PATHS["responses"],
        asked("responses", streamed=True),
        {"x-request-id": request_id},
        rcvbuf=2**15,
        limit=2**14,
    )
    await client.read_head()
    got = bytearray()
    loop = asyncio.get_running_loop()
    end = loop.time() + 0.8
    while loop.time() < end:
        got += (await client.read_chunk())[0]
        client.pause()
        await asyncio.sleep(0.05)
    assert len(got) < 120 * 2**16
    got += await client.read_body()
    assert bytes(got) == b"".join([*frames[:5], *[delta] * 120, *frames[5:]])
    assert (await line_of(proxy, request_id))["outcome"] == "completed"
    await check_invariants(proxy, upstream, baseline=baseline)


# F08: gone before the first byte


@dataclass(frozen=True)
class Waiting:
    """A client that leaves before its answer: after what, and how it counts."""

    fault: str
    streamed: bool
    script: Script
    phase: str
    charge: Charge
    keepalive: str = "15s"


WAITING = [
    Waiting("stream, no head", True, [Stall()], "waiting", "input"),
    Waiting("stream, heartbeats", True, [Stall()], "streaming", "input", "20ms"),
    Waiting("JSON, no head", False, [Stall()], "waiting", "estimate"),
    Waiting(
        "JSON, half",
        False,
        [Headers(200, [("content-type", "application/json"), ("content-length", "99")]),
         Send(b'{"id": '), Stall()],
        "waiting", "estimate",
    ),
]  # fmt: skip


@pytest.mark.parametrize("way", ["close", "abort", "half-close"])
@pytest.mark.parametrize("case", WAITING, ids=lambda case: case.fault)
async def test_f08_gone_before_the_answer(
    serve: Serve, upstream: ScriptedUpstream, case: Waiting, way: str
) -> None:
    """The upstream is let go at once, the log says 499, and input and time are charged."""
    proxy, baseline = await begin(serve, upstream, streams={"keepalive": case.keepalive})
    for number, api in enumerate(STREAMED, 1):
        upstream.script(case.script)
        before = len(upstream.requests)
        client, request_id = await send(proxy, api, streamed=case.streamed)
        request = await upstream.wait_request(before + 1)
        await asyncio.sleep(0.1)
        if case.phase == "streaming":
            await client.read_head()
        gone_at = await leave(client, way)
        await wait_gone(upstream, before + 1)
        assert request.closed_at is not None
        assert 0 <= request.closed_at - gone_at < SEEN_WITHIN
        line = await line_of(proxy, request_id)
        assert (line["status"], line["outcome"]) == (499, "client_disconnected")
        check_charge(line, case.charge, request)
        metrics = await proxy.metrics()
        phases = totals(metrics, "aiproxy_client_disconnects_total", "phase")
        assert phases == {case.phase: number}
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f08_the_estimate_by_time_ends_at_the_declared_maximum(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Output that nobody saw is charged by time, but not beyond what the client allowed."""
    proxy, baseline = await begin(serve, upstream)
    upstream.default = [Stall()]
    client, request_id = await send(proxy, "responses", streamed=False, max_output_tokens=2)
    request = await upstream.wait_request(len(upstream.requests) + 1)
    await asyncio.sleep(0.2)
    client.abort()
    line = await line_of(proxy, request_id)
    check_charge(line, "delivered", request, made=2)
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f08_gone_while_its_body_is_on_the_way(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A client that leaves inside its own request costs nothing and reaches no upstream."""
    proxy, baseline = await begin(serve, upstream)
    asked_before = len(upstream.requests)
    request_id = fresh_request_id()
    client = await proxy.client()
    fields = {"content-length": "1000", "x-request-id": request_id}
    await client.request("POST", PATHS["responses"], proxy.headers(fields), b'{"model": ')
    await asyncio.sleep(0.05)
    client.abort()
    line = await line_of(proxy, request_id)
    assert (line["status"], line["outcome"]) == (499, "client_disconnected")
    check_charge(line, "nothing")
    assert len(upstream.requests) == asked_before
    await check_invariants(proxy, upstream, baseline=baseline)


# F09, F10: gone mid-stream


@EACH
@pytest.mark.parametrize("way", ["close", "abort", "half-close"])
async def test_f09_gone_mid_stream(
    serve: Serve, upstream: ScriptedUpstream, api: Api, way: str
) -> None:
    """What was delivered is charged, the upstream is let go, the phase is `streaming`."""
    proxy, baseline = await begin(serve, upstream)
    frames = events_of(api)[: FIRST_DELTA[api]]
    upstream.script(Headers(200, CHUNKED), Chunk(b"".join(frames)), Stall())
    before = len(upstream.requests)
    client, request_id = await send(proxy, api, streamed=True)
    await client.read_head()
    await client.read_until(b"Hello")
    gone_at = await leave(client, way)
    request = await wait_gone(upstream, before + 1)
    assert request.closed_at is not None
    assert 0 <= request.closed_at - gone_at < SEEN_WITHIN
    line = await line_of(proxy, request_id)
    assert (line["status"], line["outcome"]) == (499, "client_disconnected")
    check_charge(line, "estimate", request)
    assert line["output_tokens"] >= delivered(b"".join(frames))
    phases = totals(await proxy.metrics(), "aiproxy_client_disconnects_total", "phase")
    assert phases == {"streaming": 1}
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f09_many_clients_gone_mid_stream_leave_nothing(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """2,000 clients that leave mid-stream hold nothing afterwards, and each has paid."""
    proxy, baseline = await begin(serve, upstream)
    total, at_once = 2000, 40
    cast("Any", proxy.tap).raw = bytearray(proxy.tap.raw)  # so long a log is not copied each time
    before = len(upstream.requests)
    upstream.default = [
        Headers(200, CHUNKED),
        Chunk(b"".join(events_of("responses")[: FIRST_DELTA["responses"]])),
        Stall(),
    ]

    async def one(number: int) -> None:
        client, _ = await send(proxy, "responses", streamed=True)
        await client.read_head()
        await client.read_until(b"Hello")
        await leave(client, ("close", "abort", "half-close")[number % 3])

    for start in range(0, total, at_once):
        await asyncio.gather(*(one(number) for number in range(start, start + at_once)))
    for number in range(before, before + total):
        await wait_gone(upstream, number + 1)
    await check_invariants(proxy, upstream, baseline=baseline)
    gone = [line for line in proxy.request_logs() if line["outcome"] == "client_disconnected"]
    assert len(gone) == total
    assert all(line["output_tokens"] > 0 for line in gone)


def before_the_end(api: Api) -> tuple[list[bytes], list[bytes]]:
    """Return the events of a stream without the last, terminal one, and that."""
    frames = events_of(api)
    at = len(frames) - 1
    return frames[:at], frames[at:]


LAST: dict[Api, Charge] = {"responses": "estimate", "chat": "usage", "messages": "usage"}


@EACH
async def test_f10_gone_just_before_the_terminal_event(
    serve: Serve, upstream: ScriptedUpstream, api: Api
) -> None:
    """All read but the end: the real usage where it came before it, else an estimate above 0."""
    proxy, baseline = await begin(serve, upstream)
    frames, end = before_the_end(api)
    go_on = asyncio.Event()
    upstream.script(Headers(200, CHUNKED), *map(Chunk, frames), Wait(go_on), *map(Chunk, end))
    before = len(upstream.requests)
    client, request_id = await send(proxy, api, streamed=True)
    await client.read_head()
    await client.read_until(frames[-1][-40:])
    client.abort()
    request = await wait_gone(upstream, before + 1)
    go_on.set()
    line = await line_of(proxy, request_id)
    assert line["outcome"] == "client_disconnected"
    check_charge(line, LAST[api], request)
    if LAST[api] == "estimate":
        assert line["output_tokens"] >= delivered(b"".join(frames))
    await check_invariants(proxy, upstream, baseline=baseline)


@EACH
async def test_f10_gone_right_after_the_terminal_event(
    serve: Serve, upstream: ScriptedUpstream, api: Api
) -> None:
    """A client that leaves once it has the end pays what the upstream counted."""
    proxy, baseline = await begin(serve, upstream)
    frames = events_of(api)
    upstream.script(Headers(200, CHUNKED), *map(Chunk, frames), Stall())
    before = len(upstream.requests)
    client, request_id = await send(proxy, api, streamed=True)
    await client.read_head()
    await client.read_until(frames[-1])
    client.abort()
    await wait_gone(upstream, before + 1)
    check_charge(await line_of(proxy, request_id), "usage")
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_f10_gone_while_a_json_answer_is_written(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A client that leaves before it took a large JSON answer pays what the upstream counted."""
    proxy, baseline = await begin(serve, upstream)
    whole = json_of("responses", "x" * (12 * 2**20))
    upstream.script(json_answer(whole))
    request_id = fresh_request_id()
    client = await proxy.send(
        PATHS["responses"],
        asked("responses", streamed=False),
        {"x-request-id": request_id},
        rcvbuf=4096,
        limit=1024,
    )
    head = await client.read_head()
    assert head.header("content-length") == str(len(json.dumps(whole)))
    client.abort()
    line = await line_of(proxy, request_id)
    assert (line["status"], line["outcome"]) == (499, "client_disconnected")
    check_charge(line, "usage")
    await check_invariants(proxy, upstream, baseline=baseline)
