"""Limits under load, on the real daemon: bursts, aborts in every phase, and what is charged."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aiproxy.limits import Combined, Demand
from answers import Usage
from faults import Serve
from invariants import check_invariants, check_settled, eventually
from responses import responses_events, responses_json
from rig import TEAM_A, Proxy, key_hash, prompt, totals
from steps import SSE_HEADERS as CHUNKED
from steps import Chunk, EndChunks, Finish, Headers, Reset, Send, Stall, Step, Wait
from upstream import Recorded, ScriptedUpstream, error_answer, json_answer, stream

LONG = bool(os.environ.get("AIPROXY_LONG"))
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
        self.began = self.answered = time.monotonic()
        self.release = asyncio.Event()
        frames = responses_events("Hello", usage=LARGE)
        upstream.default = [
            Headers(200, CHUNKED), Chunk(frames[0]), Wait(self.release),
            *map(Chunk, frames[1:]), EndChunks(),
        ]  # fmt: skip
        self.before = len(proxy.request_logs())
        self.open: list[Any] = []
        self.refused = 0

    async def ask(self) -> None:
        """One of them."""
        client = await self.proxy.send("/v1/responses", prompt(**FIELDS))
        head = await client.read_head()
        self.answered = time.monotonic()
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

    async def used(self, last: "Burst | None" = None) -> float:
        """What the key used of its limit, in limits, less what came up to the last admission."""
        await eventually(_logged(self.proxy, self.before + BURST))
        await eventually(_at_rest(self.proxy))
        seconds = (last or self).answered - self.began
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
    await wave.finish()
    return await wave.used()


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize(("reserve", "most"), [("max", 1.0), ("p90", 2.0)])
async def test_a_burst_gets_what_is_promised(
    serve: Serve, upstream: ScriptedUpstream, reserve: str, most: float, *, history: bool
) -> None:
    """200 streams of 4k tokens at 60k/min: once the limit with max, at most twice with p90."""
    proxy = await serve(keys=limited(tokens=f"{LIMIT}/min"), limiter={"reserve": reserve})
    if history:
        teach(proxy)
    assert 0.5 < await burst(proxy, upstream) <= most


async def test_a_burst_after_a_thousand_tiny_answers(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """History that makes a request look free does not make the burst larger than twice."""
    proxy = await serve(keys=limited(tokens=f"{LIMIT}/min"))
    upstream.default = json_answer(responses_json("x", usage=TINY))
    client, tiny = await proxy.client(), b'{"model":"gpt-test","input":"x"}'
    for _ in range(1000):
        await client.request("POST", "/v1/responses", proxy.headers(), tiny)
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
    asks = [third.ask() for _ in range(BURST - 50)]
    await asyncio.gather(*asks[:75], second.finish(), *asks[75:])
    await third.finish()
    assert 1.0 < await first.used(third) <= 2.0


async def test_post_paid_limits_fail_this_test(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who checks before and charges after admits the whole burst: 13 times the limit."""
    admit = Combined.admit
    monkeypatch.setattr(Combined, "admit", lambda self, _demand: admit(self, Demand(1, 0, None)))
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
    upstream.default = PHASES["before a token"]
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
    for line in proxy.request_logs()[:-1]:
        assert line["outcome"] == "client_disconnected"
        assert 2500 <= line["output_tokens"] <= 4096  # 30 ms, but at most what was declared


def _at_rest(proxy: Proxy) -> Callable[[], Awaitable[None]]:
    async def holds() -> None:
        check_settled(proxy)

    return holds


# Aborts in every phase

FRAMES = responses_events("Hello world")
HALF = FRAMES[5][:-9]  # not passed on before it is whole, but held with what it belongs to
PHASES: dict[str, list[Step]] = {
    "waiting": [Stall()],
    "JSON waiting": [Stall()],
    "JSON": [json_answer(b" " * 99)[0], Send(b'{"id":'), Stall()],
    "before a token": [Headers(200, CHUNKED), Chunk(FRAMES[0]), Stall()],
    "first token": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:5])), Stall()],
    "mid-event": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:5]) + HALF), Stall()],
    "before the end": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:-1])), Stall()],
    "cut": [Headers(200, CHUNKED), Chunk(b"".join(FRAMES[:5])), Finish()],
    "whole": stream(FRAMES),
    "reset": [Reset()],
    **{str(status): error_answer(status) for status in (400, 429, 500, 503)},
}
SEEN = {"before a token": FRAMES[0], "first token": b"Hello", "mid-event": b"Hello",
        "before the end": FRAMES[-2], "cut": b"response.failed", "whole": FRAMES[-1]}  # fmt: skip
STATUSES = {"no body": 100, "half a body": 100, "bad JSON": 400, "unknown model": 404,
            "reset": 502, "400": 400, "429": 429, "500": 502, "503": 503}  # fmt: skip
UNSEEN = {"waiting": 0, "JSON waiting": 0, "JSON": 6}  # bytes of the answer to be on their way
BODIES = {"no body": b"", "half a body": b'{"model": ', "bad JSON": b"{",
          "unknown model": json.dumps(prompt(model="unknown")).encode()}  # fmt: skip
LEFT = {*UNSEEN, "no body", "half a body"}, {*SEEN} - {"cut", "whole"}  # waiting, streaming


@pytest.mark.timeout(300 if LONG else 60)
async def test_aborts_in_every_phase_leave_nothing(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """360 requests (10,008 with AIPROXY_LONG) that end in every way hold nothing afterwards."""
    limits = {"requests": "1000000/min", "tokens": "900000000/min", "concurrent": 50}
    proxy = await serve(
        keys=limited(**limits), routes=[{"model": "gpt-test", "upstreams": ["scripted"],
                                         "limits": {"concurrent": 50, "tokens": "900000000/min"}}],
    )  # fmt: skip
    ways = [*PHASES, *BODIES]
    came: dict[int, Recorded] = {}

    def script_for(request: Recorded) -> list[Step]:
        number = int(request.json()["user"])
        came[number] = request
        return PHASES[ways[number % len(ways)]]

    async def one(number: int) -> None:
        way, client = ways[number % len(ways)], await proxy.client()
        body = prompt(stream="JSON" not in way, user=str(number))
        fields = {"expect": "100-continue", "content-length": "999"} if "body" in way else {}
        sent = BODIES[way] if way in BODIES else json.dumps(body).encode()
        await client.request("POST", "/v1/responses", proxy.headers(fields), sent)
        if way in UNSEEN:

            async def reached() -> None:
                assert number in came
                assert came[number].sent >= UNSEEN[way]

            await eventually(reached)
        else:
            assert (await client.read_head()).status == STATUSES.get(way, 200)
        if way in SEEN:
            await client.read_until(SEEN[way])
        if way in LEFT[0] | LEFT[1]:
            leave = (client.abort, client.half_close, client.writer.close)
            leave[number // len(ways) % 3]()

    upstream.default = script_for
    total, at_once = len(ways) * (556 if LONG else 20), 40
    for start in range(0, total, at_once):
        await asyncio.gather(*map(one, range(start, min(start + at_once, total))))
        await eventually(_at_rest(proxy))
        await proxy.close_clients()
    await eventually(_logged(proxy, total))
    phases = totals(await proxy.metrics(), "aiproxy_client_disconnects_total", "phase")
    each = total // len(ways)
    assert phases == {"waiting": each * len(LEFT[0]), "streaming": each * len(LEFT[1])}
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


async def told(proxy: Proxy) -> dict[str, str]:
    """What remains as headers tell it; this call itself takes nothing."""
    answer = await proxy.get("/v1/models")
    return {it: answer.headers[f"x-ratelimit-remaining-{it}"] for it in ("requests", "tokens")}


@pytest.mark.parametrize("status", [400, 429, 500, 503, 529, None])
async def test_f17_a_refusal_of_the_upstream_costs_no_tokens(
    serve: Serve, upstream: ScriptedUpstream, status: int | None
) -> None:
    """All that was set aside comes back; the request itself counts."""
    proxy = await serve(keys=limited(tokens="100000/min", requests="100/min"))
    freeze(proxy)
    upstream.script(error_answer(status) if status else [Reset()])
    assert (await proxy.post()).status >= 400
    await eventually(_at_rest(proxy))
    assert await told(proxy) == {"requests": "99", "tokens": "100000"}


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


BAD = [("input", "-50000"), ("output", "-90000"), ("output", "100000001"), ("input", '"7"')]


@pytest.mark.parametrize(("field", "value"), BAD)
@pytest.mark.parametrize("streamed", [False, True])
async def test_f20_a_bad_usage_fills_no_bucket(
    serve: Serve, upstream: ScriptedUpstream, field: str, value: str, *, streamed: bool
) -> None:
    """Then the estimate is charged, exactly."""
    proxy = await serve(keys=limited(tokens="100000/min"))
    freeze(proxy)
    good, bad = f'"{field}_tokens": 7777', f'"{field}_tokens": {value}'
    usage = Usage(input=7777, cached=0, output=7777)
    frames = responses_events("Hello", usage=usage)
    whole = [json.dumps(responses_json("Hello", usage=usage)).encode()]
    broken = [part.replace(good.encode(), bad.encode()) for part in (frames if streamed else whole)]
    assert bad.encode() in broken[-1]
    upstream.script(stream(broken) if streamed else json_answer(broken[0]))
    body = json.dumps(prompt(stream=streamed)).encode()
    assert (await proxy.post(body=body)).status == 200
    await eventually(_logged(proxy, 1))
    (line,) = proxy.request_logs()
    assert (line["estimated"], line["input_tokens"]) == (True, len(body) // 4)
    assert 0 < line["output_tokens"] < 1000
    assert left(proxy) == 100_000 - line["input_tokens"] - line["output_tokens"]


async def test_f34_the_wall_clock_does_not_matter(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour forwards or back neither refills nor takes, though it is worth 2 and 400 here."""
    tokens = {"rate": "9600/day", "burst": 2000}
    proxy = await serve(keys=limited(requests={"rate": "48/day", "burst": 3}, tokens=tokens))
    # What is bound before the test cannot be patched, hence would not be seen below.
    assert proxy.daemon._limits._clock.read is time.monotonic_ns
    real, real_ns = time.time, time.time_ns
    for number, jump in enumerate((0, 3600, -3600, 3600), 1):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: real_ns() + jump * 10**9)
        used = min(number, 3)
        assert (await proxy.post()).status == (200 if number == used else 429)
        await eventually(_at_rest(proxy))
        assert await told(proxy) == {"requests": str(3 - used), "tokens": str(2000 - 18 * used)}
