"""Limits under load, on the real daemon: bursts, aborts in every phase, and what is charged."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aiproxy.limits import Combined, Demand, Refusal, Reservation
from answers import Usage
from client import RawClient
from invariants import check_invariants, check_settled, eventually
from responses import responses_events, responses_json
from rig import TEAM_A, Proxy, key_hash, prompt
from steps import Step
from upstream import (
    Chunk,
    EndChunks,
    Finish,
    Headers,
    Reset,
    ScriptedUpstream,
    Send,
    Stall,
    Wait,
    error_answer,
    json_answer,
    stream,
)

Serve = Callable[..., Awaitable[Proxy]]
LONG = bool(os.environ.get("AIPROXY_LONG"))
CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
LIMIT = 60_000  # tokens per minute
BURST = 200
LARGE = Usage(20, 0, 4000, 0)
TINY = Usage(2, 0, 1, 0)
FIELDS: dict[str, Any] = {"stream": True, "max_output_tokens": 4096}


def limited(**limits: Any) -> dict[str, Any]:
    """The key team-a with limits."""
    return {"team-a": {"sha256": key_hash(TEAM_A), "limits": limits}}


class Burst:
    """So many streams at once; each is held open until `release`, then uses 4,020 tokens."""

    def __init__(self, proxy: Proxy, upstream: ScriptedUpstream) -> None:
        self.proxy = proxy
        self.began = time.monotonic()
        self.release = asyncio.Event()
        frames = responses_events("Hello", usage=LARGE)
        upstream.default = [
            Headers(200, CHUNKED), Chunk(frames[0]), Wait(self.release),
            *map(Chunk, frames[1:]), EndChunks(),
        ]  # fmt: skip
        self.before = len(proxy.request_logs())
        self.open: list[RawClient] = []
        self.refused = 0

    async def ask(self) -> None:
        """One of them."""
        client = await self.proxy.send("/v1/responses", prompt(**FIELDS))
        head = await client.read_head()
        if head.status == 200:
            self.open.append(client)
        else:
            assert head.status == 429
            self.refused += 1

    async def finish(self) -> None:
        """Let all that are open come to their end."""
        self.release.set()
        for client in self.open:
            await client.read_body()
        self.open.clear()

    async def used(self) -> float:
        """What the key used of its limit, in limits, less what time has brought."""
        await eventually(_logged(self.proxy, self.before + BURST))
        await eventually(_at_rest(self.proxy))
        seconds = time.monotonic() - self.began
        lines = self.proxy.request_logs()[self.before :]
        tokens: int = sum(line["input_tokens"] + line["output_tokens"] for line in lines)
        return (tokens - LIMIT / 60 * seconds) / LIMIT


def _logged(proxy: Proxy, lines: int) -> Callable[[], Awaitable[None]]:
    async def holds() -> None:
        assert len(proxy.request_logs()) == lines

    return holds


async def burst(proxy: Proxy, upstream: ScriptedUpstream) -> float:
    """The burst of the issue, all at once."""
    wave = Burst(proxy, upstream)
    await asyncio.gather(*(wave.ask() for _ in range(BURST)))
    assert len(wave.open) + wave.refused == BURST
    await wave.finish()
    return await wave.used()


@pytest.mark.parametrize(("reserve", "most"), [("max", 1.0), ("p90", 2.0)])
async def test_a_burst_gets_what_is_promised(
    serve: Serve, upstream: ScriptedUpstream, reserve: str, most: float
) -> None:
    """200 streams of 4k tokens at 60k/min: once the limit with max, at most twice with p90."""
    proxy = await serve(keys=limited(tokens=f"{LIMIT}/min"), limiter={"reserve": reserve})
    assert 0.5 < await burst(proxy, upstream) <= most


async def test_a_burst_after_a_thousand_tiny_answers(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """History that makes a request look free does not make the burst larger than twice."""
    proxy = await serve(keys=limited(tokens=f"{LIMIT}/min"))
    upstream.default = json_answer(responses_json("x", usage=TINY))
    client = await proxy.client()
    for _ in range(1000):
        await client.request(
            "POST", "/v1/responses", proxy.headers(), b'{"model":"gpt-test","input":"x"}'
        )
        assert (await client.answer()).status == 200
    assert proxy.daemon._proxy._recent.outputs.p90("team-a", "gpt-test") == 1
    await eventually(_logged(proxy, 1000))
    assert 1.0 < await burst(proxy, upstream) <= 2.0


def teach(proxy: Proxy) -> None:
    """Let the history say that an answer has one token, as many tiny calls in between would."""
    for _ in range(64):
        proxy.daemon._proxy._recent.outputs.observe("team-a", "gpt-test", 1)


async def test_a_burst_whose_streams_end_while_others_come(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Ends between arrivals make room for others, but not beyond twice the limit."""
    proxy = await serve(keys=limited(tokens=f"{LIMIT}/min"))
    teach(proxy)
    first = Burst(proxy, upstream)
    await asyncio.gather(*(first.ask() for _ in range(14)))
    second = Burst(proxy, upstream)
    await asyncio.gather(*(second.ask() for _ in range(36)))
    assert (len(first.open), first.refused) == (14, 0)
    assert second.refused > 0  # by what the open ones may use
    await first.finish()
    teach(proxy)
    third = Burst(proxy, upstream)
    await asyncio.gather(*(third.ask() for _ in range(BURST - 50)))
    await second.finish()
    await third.finish()
    assert 1.0 < await first.used() <= 2.0


async def test_post_paid_limits_fail_this_test(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who checks before and charges after admits the whole burst: 13 times the limit."""
    admit = Combined.admit

    def post_paid(self: Combined, demand: Demand) -> Reservation | Refusal:
        return admit(self, Demand(1, 0, slot=demand.slot))

    monkeypatch.setattr(Combined, "admit", post_paid)
    proxy = await serve(keys=limited(tokens=f"{LIMIT}/min"))
    assert await burst(proxy, upstream) > 10


async def test_who_leaves_silent_reasoning_again_and_again_runs_out(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """No output ever came, yet the upstream has worked: the key pays by time."""
    proxy = await serve(keys=limited(tokens=f"{LIMIT}/min"))
    # As if the target made 100,000 tokens per second, so that tens of milliseconds count for much.
    proxy.daemon._proxy._recent.pace._rates["gpt-test", "scripted"] = 100_000.0
    proxy.daemon._proxy._recent.outputs.observe("team-a", "gpt-test", 10)
    created = responses_events("x")[0]
    upstream.default = [Headers(200, CHUNKED), Chunk(created), Stall()]
    statuses = []
    for _ in range(100):
        client = await proxy.send("/v1/responses", prompt(**FIELDS))
        statuses.append((await client.read_head()).status)
        if statuses[-1] != 200:
            break
        await client.read_until(b"response.created")
        await asyncio.sleep(0.03)
        client.abort()
        await eventually(_at_rest(proxy))
    assert statuses[-1] == 429
    assert 10 <= len(statuses) < 60
    lines = proxy.request_logs()
    assert all(line["outcome"] == "client_disconnected" for line in lines[:-1])


def _at_rest(proxy: Proxy) -> Callable[[], Awaitable[None]]:
    async def holds() -> None:
        check_settled(proxy)

    return holds


# Aborts in every phase


FRAMES = responses_events("Hello world")
PHASES: dict[str, list[Step]] = {
    "waiting": [Stall()],
    "first token": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:5])), Stall()],
    "mid-event": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:5]) + FRAMES[5][:20]), Stall()],
    "before the end": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:-1])), Stall()],
    "JSON": [
        Headers(200, [("content-type", "application/json"), ("content-length", "99")]),
        Send(b'{"id":'),
        Stall(),
    ],
    "400": error_answer(400),
    "429": error_answer(429),
    "500": error_answer(500),
    "503": error_answer(503),
    "reset": [Reset()],
    "cut": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:5])), Finish()],
    "whole": stream(FRAMES),
}


async def test_aborts_in_every_phase_leave_nothing(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """300 requests (10,000 with AIPROXY_LONG) that end in every way hold nothing afterwards."""
    limits = {"requests": "1000000/min", "tokens": "900000000/min", "concurrent": 50}
    proxy = await serve(
        keys=limited(**limits), routes=[{"model": "gpt-test", "upstreams": ["scripted"],
                                         "limits": {"concurrent": 50, "tokens": "900000000/min"}}],
    )  # fmt: skip
    ways = [*PHASES, "no body", "half a body", "bad JSON", "unknown model"]

    async def one(number: int) -> None:
        way = ways[number % len(ways)]
        client = await proxy.client()
        body = prompt(stream=way != "JSON", user=way)
        match way:
            case "no body" | "half a body":
                fields = proxy.headers({"content-length": "1000"})
                sent = b"" if way == "no body" else b'{"model": '
                await client.request("POST", "/v1/responses", fields, sent)
                await asyncio.sleep(0)
                client.abort()
            case "bad JSON":
                await client.request("POST", "/v1/responses", proxy.headers(), b"{")
                assert (await client.answer()).status == 400
            case "unknown model":
                client = await proxy.send("/v1/responses", {**body, "model": "x"})
                assert (await client.answer()).status == 404
            case _:
                client = await proxy.send("/v1/responses", body)
                await _leave(client, way)

    def script_for(request: Any) -> list[Step]:
        return PHASES[request.json()["user"]]

    upstream.default = script_for
    total, at_once = (10_000 if LONG else 320), 40
    for start in range(0, total, at_once):
        await asyncio.gather(*(one(number) for number in range(start, start + at_once)))
        await proxy.close_clients()
    await eventually(_at_rest(proxy), within=5)
    await check_invariants(proxy, upstream)
    # All slots are there.
    go_on = asyncio.Event()
    upstream.default = [Headers(200, CHUNKED), Chunk(FRAMES[0]), Wait(go_on),
                        *map(Chunk, FRAMES[1:]), EndChunks()]  # fmt: skip
    clients = [await proxy.send("/v1/responses", prompt(stream=True)) for _ in range(50)]
    assert [(await client.read_head()).status for client in clients] == [200] * 50
    assert (await proxy.post("/v1/responses", prompt(stream=True))).status == 429
    go_on.set()
    for client in clients:
        await client.read_body()
    await check_invariants(proxy, upstream)


async def _leave(client: RawClient, way: str) -> None:
    """Go at the moment that a phase is about."""
    if way in ("waiting", "JSON"):
        await asyncio.sleep(0.01)
        client.abort()
        return
    head = await client.read_head()
    if way in ("first token", "mid-event", "before the end"):
        assert head.status == 200
        await client.read_until(b"Hello")
        client.abort()
    elif way in ("cut", "whole"):
        await client.read_body()


# Slots


@pytest.mark.parametrize("way", ["last byte", "client left", "upstream failed"])
async def test_a_slot_is_free_at_once(serve: Serve, upstream: ScriptedUpstream, way: str) -> None:
    """The third of two is refused; once one has ended in any way, the next is admitted."""
    proxy = await serve(keys=limited(concurrent=2))
    ends = [asyncio.Event(), asyncio.Event()]
    for end in ends:
        rest = [Reset()] if way == "upstream failed" else [*map(Chunk, FRAMES[1:]), EndChunks()]
        upstream.script(Headers(200, CHUNKED), Chunk(FRAMES[0]), Wait(end), *rest)
    clients = []
    for _ in ends:
        clients.append(await proxy.send("/v1/responses", prompt(stream=True)))
        assert (await clients[-1].read_head()).status == 200
    refused = await proxy.post()
    assert (refused.status, refused.json()["error"]["type"]) == (429, "concurrent")
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")
    if way == "client left":
        clients[0].abort()
        await eventually(_logged(proxy, 2))  # the refusal, and this one
    else:
        ends[0].set()
        await clients[0].read_body()
    assert (await proxy.post()).status == 200
    ends[1].set()
    await check_invariants(proxy, upstream)


# What is charged


def left(proxy: Proxy) -> int:
    """What team-a has left of its tokens."""
    (level,) = [it for it in proxy.daemon._limits.levels("keys")["team-a"] if it.kind == "tokens"]
    return level.remaining


def freeze(proxy: Proxy) -> None:
    """Let the limiter's time stand still, so that nothing is refilled."""
    now = proxy.daemon._limits._clock.latest
    proxy.daemon._limits._clock.read = lambda: now


@pytest.mark.parametrize(
    "script",
    [error_answer(400), error_answer(429), error_answer(500), error_answer(529), [Reset()]],
    ids=["400", "429", "500", "529", "reset"],
)
async def test_f17_a_refusal_of_the_upstream_costs_no_tokens(
    serve: Serve, upstream: ScriptedUpstream, script: list[Step]
) -> None:
    """All that was set aside comes back; the request itself counts."""
    proxy = await serve(keys=limited(tokens="100000/min", requests="100/min"))
    freeze(proxy)
    upstream.script(script)
    assert (await proxy.post()).status >= 400
    await eventually(_at_rest(proxy))
    assert left(proxy) == 100_000
    (requests,) = [
        it for it in proxy.daemon._limits.levels("keys")["team-a"] if it.kind == "requests"
    ]
    assert requests.remaining == 99


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_every_endpoint_is_charged_what_was_counted(
    serve: Serve, upstream: ScriptedUpstream, path: str, *, streamed: bool
) -> None:
    """Streams and JSON of each API take the upstream's own count, no more and no less."""
    proxy = await serve(keys=limited(tokens="100000/min"))
    freeze(proxy)
    upstream.usage = Usage(100, 30, 50, 20)
    assert (await proxy.post(path, prompt(path, stream=streamed))).status == 200
    await eventually(_at_rest(proxy))
    assert left(proxy) == 100_000 - 150


@pytest.mark.parametrize("usage", [Usage(-50_000, 0, 1), Usage(10**9, 0, 1), Usage(5, 0, -90_000)])
async def test_f20_a_bad_usage_fills_no_bucket(
    serve: Serve, upstream: ScriptedUpstream, usage: Usage
) -> None:
    """Then the estimate is charged."""
    proxy = await serve(keys=limited(tokens="100000/min"))
    freeze(proxy)
    upstream.script(json_answer(responses_json("Hello", usage=usage)))
    assert (await proxy.post()).status == 200
    await eventually(_at_rest(proxy))
    assert 90_000 < left(proxy) < 100_000


async def test_f34_the_wall_clock_does_not_matter(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour forwards or back neither refills nor takes."""
    proxy = await serve(keys=limited(requests="3/day"))
    real = time.time
    statuses = []
    for jump in (0, 3600, -3600, 7200):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        statuses.append((await proxy.post()).status)
    assert statuses == [200, 200, 200, 429]
